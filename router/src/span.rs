//! Fewer tokens than features: the work happens in the span of the tokens.

use moe_merge_kernels::dense::{Dense, Into, matmul};

use crate::error::RouterError;

/// Variance along a direction, relative to the largest, below which it counts as rounding.
const NEGLIGIBLE: f64 = 1e-13;

/// Orthonormal coordinates of the rows of `x: [n, width]`.
///
/// A solution with an L2 penalty lies in the span of the rows, so it has `rank <= n` coordinates there, its norm is
/// theirs, and nothing is lost. With `K = x · xᵀ = L · Lᵀ` (pivoted Cholesky, f64), row `i` of `L` holds the coordinates of token `i`, and
/// the basis is `L_p⁻¹ · x_p` over the pivot rows `p`.
pub(crate) struct Span {
    pub rank: usize,
    /// `[n, rank]`.
    pub coordinates: Vec<f64>,
    /// Row of `x` behind each coordinate.
    pivots: Vec<usize>,
}

impl Span {
    pub fn new(x: &[f64], n: usize, width: usize) -> Result<Self, RouterError> {
        let view = Dense::new(x, n, width)?;
        let mut gram = vec![0.0; n * n];
        matmul(view, view.transposed(), &mut gram, Into::Overwrite)?;
        let mut left: Vec<f64> = (0..n).map(|i| gram[i * n + i]).collect();
        let limit = left.iter().copied().fold(0.0, f64::max) * NEGLIGIBLE;
        let mut columns: Vec<Vec<f64>> = Vec::new();
        let mut pivots = Vec::new();
        for _ in 0..n.min(width) {
            // First of the largest: ties are broken by place, not by chance.
            let p = (0..n).fold(0, |best, i| if left[i] > left[best] { i } else { best });
            if left[p] <= limit {
                break;
            }
            let root = left[p].sqrt();
            let mut column = gram[p * n..(p + 1) * n].to_vec();
            for c in &columns {
                let factor = c[p];
                column.iter_mut().zip(c).for_each(|(v, w)| *v -= factor * w);
            }
            column.iter_mut().for_each(|v| *v /= root);
            pivots.iter().for_each(|&q: &usize| column[q] = 0.0);
            column[p] = root;
            left.iter_mut().zip(&column).for_each(|(l, v)| *l -= v * v);
            pivots.push(p);
            pivots.iter().for_each(|&q| left[q] = 0.0);
            columns.push(column);
        }
        let rank = columns.len();
        let mut coordinates = vec![0.0; n * rank];
        for (k, column) in columns.iter().enumerate() {
            column.iter().enumerate().for_each(|(i, &v)| coordinates[i * rank + k] = v);
        }
        Ok(Self { rank, coordinates, pivots })
    }

    /// Parameters `[experts, rank]` as parameters `[experts, width]` of the rows `x`.
    pub fn expand(&self, v: &[f64], x: &[f64], width: usize) -> Vec<f64> {
        let rank = self.rank;
        let lower = |row: usize, col: usize| self.coordinates[self.pivots[row] * rank + col];
        let mut out = Vec::new();
        for v in v.chunks_exact(rank) {
            let mut a = v.to_vec();
            for j in (0..rank).rev() {
                let known: f64 = (j + 1..rank).map(|k| a[k] * lower(k, j)).sum();
                a[j] = (a[j] - known) / lower(j, j);
            }
            let mut row = vec![0.0; width];
            for (factor, &p) in a.iter().zip(&self.pivots) {
                for (r, x) in row.iter_mut().zip(&x[p * width..(p + 1) * width]) {
                    *r += factor * x;
                }
            }
            out.extend(row);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_products_and_norms() {
        let (n, width) = (6, 11);
        let noise = crate::estimators::random::gate(n, width, 1, 0);
        let mut x: Vec<f64> = noise.rows.iter().map(|&v| f64::from(v)).collect();
        x.copy_within(0..width, 3 * width); // row 3 = row 0
        let span = Span::new(&x, n, width).unwrap();
        assert_eq!(span.rank, 5);
        let v: Vec<f64> = (0..2 * span.rank).map(|i| i as f64 - 3.0).collect();
        let w = span.expand(&v, &x, width);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        for e in 0..2 {
            let (v, w) = (&v[e * span.rank..][..span.rank], &w[e * width..][..width]);
            assert!((dot(v, v) - dot(w, w)).abs() < 1e-10 * dot(v, v));
            for i in 0..n {
                let inside = dot(v, &span.coordinates[i * span.rank..][..span.rank]);
                assert!((inside - dot(w, &x[i * width..][..width])).abs() < 1e-10);
            }
        }
    }
}

//! Symmetric positive definite matrices in square tiles: sums, factorisation, solutions.

use moe_merge_kernels::dense::{Dense, Into, matmul};
use rayon::prelude::*;

use crate::error::RouterError;

/// Rows and columns of a tile: three of them stay in the second cache.
pub(crate) const TILE: usize = 128;

/// How many tiles cover `width`.
pub(crate) fn tiles(width: usize) -> usize {
    width.div_ceil(TILE)
}

/// Rows that tile `i` covers.
pub(crate) fn tile_rows(i: usize, width: usize) -> std::ops::Range<usize> {
    i * TILE..width.min((i + 1) * TILE)
}

/// The lower half of a symmetric matrix, or a lower triangular matrix, `[width, width]` f64.
#[derive(Debug, Clone)]
pub(crate) struct Symmetric {
    pub width: usize,
    /// `columns[k][i - k]` is tile `(i, k)`, `i >= k`: row-major `[rows of i, rows of k]`.
    columns: Vec<Vec<Vec<f64>>>,
}

impl Symmetric {
    /// `tile(i, k)` gives the tile of rows `i` and columns `k <= i`.
    pub fn from_tiles(width: usize, mut tile: impl FnMut(usize, usize) -> Vec<f64>) -> Self {
        let count = tiles(width);
        let columns = (0..count).map(|k| (k..count).map(|i| tile(i, k)).collect()).collect();
        Self { width, columns }
    }

    fn size(&self, i: usize) -> usize {
        tile_rows(i, self.width).len()
    }

    /// Each tile with its rows and columns.
    fn each(&mut self) -> impl Iterator<Item = (usize, usize, &mut Vec<f64>)> {
        self.columns.iter_mut().enumerate().flat_map(|(k, column)| {
            column.iter_mut().enumerate().map(move |(d, tile)| (k + d, k, tile))
        })
    }

    /// Every entry times `factor`.
    pub fn scale(&mut self, factor: f64) {
        self.each().for_each(|(_, _, tile)| tile.iter_mut().for_each(|v| *v *= factor));
    }

    /// `value` added to the diagonal.
    pub fn add_to_diagonal(&mut self, value: f64) {
        self.add_diagonal(&vec![value; self.width]);
    }

    /// `values` added to the diagonal, `[width]`.
    pub fn add_diagonal(&mut self, values: &[f64]) {
        let width = self.width;
        for (k, column) in self.columns.iter_mut().enumerate() {
            let rows = tile_rows(k, width);
            let size = rows.len();
            rows.enumerate().for_each(|(i, row)| column[0][i * size + i] += values[row]);
        }
    }

    /// All zeros.
    pub fn zeros(width: usize) -> Self {
        let size = |i| tile_rows(i, width).len();
        Self::from_tiles(width, |i, k| vec![0.0; size(i) * size(k)])
    }

    /// `xᵀ · x` added, for `x [n, width]`: f32 products, f64 sums.
    pub fn add_gram(&mut self, x: &[f32]) -> Result<(), RouterError> {
        let width = self.width;
        let x = Dense::new(x, x.len().checked_div(width).unwrap_or(0), width)?;
        let mut tiles: Vec<_> = self.each().collect();
        tiles.par_iter_mut().try_for_each(|(i, k, tile)| {
            let mut product = vec![0f32; tile.len()];
            let left = x.columns(tile_rows(*i, width))?.transposed();
            matmul(left, x.columns(tile_rows(*k, width))?, &mut product, Into::Overwrite)?;
            tile.iter_mut().zip(&product).for_each(|(t, p)| *t += f64::from(*p));
            Ok(())
        })
    }

    /// `-leftᵀ · right` added, for `left` and `right` `[n, width]` whose product is symmetric.
    pub fn subtract_product(&mut self, left: &[f64], right: &[f64]) -> Result<(), RouterError> {
        let (width, n) = (self.width, left.len() / self.width);
        let cut = |x: &[f64], i: usize, factor: f64| -> Vec<f64> {
            let rows = tile_rows(i, width);
            x.chunks_exact(width)
                .flat_map(|x| x[rows.clone()].iter().map(move |v| factor * v))
                .collect()
        };
        let lefts: Vec<_> = (0..tiles(width)).map(|i| cut(left, i, -1.0)).collect();
        let rights: Vec<_> = (0..tiles(width)).map(|i| cut(right, i, 1.0)).collect();
        for (i, k, tile) in self.each() {
            let a = Dense::new(&lefts[i], n, tile_rows(i, width).len())?;
            let b = Dense::new(&rights[k], n, tile_rows(k, width).len())?;
            matmul(a.transposed(), b, tile, Into::Add)?;
        }
        Ok(())
    }

    /// Sum of the diagonal.
    pub fn trace(&self) -> f64 {
        let diagonal = |(k, column): (usize, &Vec<Vec<f64>>)| {
            let size = self.size(k);
            (0..size).map(|i| column[0][i * size + i]).sum::<f64>()
        };
        self.columns.iter().enumerate().map(diagonal).sum()
    }

    /// The whole matrix, row-major `[width, width]`.
    pub fn full(&self) -> Vec<f64> {
        let width = self.width;
        let mut out = vec![0.0; width * width];
        for (k, column) in self.columns.iter().enumerate() {
            for (d, tile) in column.iter().enumerate() {
                for (row, values) in tile_rows(k + d, width).zip(tile.chunks_exact(self.size(k))) {
                    for (col, &v) in tile_rows(k, width).zip(values) {
                        if col <= row {
                            out[row * width + col] = v;
                            out[col * width + row] = v;
                        }
                    }
                }
            }
        }
        out
    }

    /// `L` with `L · Lᵀ` the matrix: left-looking, a column of tiles at a time, its tiles side by side.
    ///
    /// Every tile is made by the same operations in the same order whatever the thread count. A pivot that rounding has
    /// eaten counts as the rounding of the largest diagonal entry.
    pub fn cholesky(mut self) -> Result<Cholesky, RouterError> {
        let width = self.width;
        let largest = (0..self.columns.len())
            .flat_map(|k| {
                let size = self.size(k);
                (0..size).map(move |i| (k, i * size + i))
            })
            .fold(0.0, |m: f64, (k, at)| m.max(self.columns[k][0][at]));
        let floor = (largest * f64::EPSILON).max(f64::MIN_POSITIVE);
        let mut inverses = Vec::with_capacity(self.columns.len());
        for k in 0..self.columns.len() {
            let (done, rest) = self.columns.split_at_mut(k);
            let column = &mut rest[0];
            let size = tile_rows(k, width).len();
            column.par_iter_mut().enumerate().try_for_each(|(d, tile)| {
                let rows = tile_rows(k + d, width).len();
                let mut sum = vec![0.0; tile.len()];
                for (j, earlier) in done.iter().enumerate() {
                    let inner = tile_rows(j, width).len();
                    let a = Dense::new(&earlier[k + d - j], rows, inner)?;
                    let b = Dense::new(&earlier[k - j], size, inner)?;
                    matmul(a, b.transposed(), &mut sum, Into::Add)?;
                }
                tile.iter_mut().zip(&sum).for_each(|(v, s)| *v -= s);
                Ok::<_, RouterError>(())
            })?;
            let (diagonal, below) = column.split_at_mut(1);
            factor_tile(&mut diagonal[0], size, floor);
            let inverse = invert_tile(&diagonal[0], size);
            below.par_iter_mut().try_for_each(|tile| {
                let rows = tile.len() / size;
                let mut out = vec![0.0; tile.len()];
                let a = Dense::new(tile, rows, size)?;
                let b = Dense::new(&inverse, size, size)?;
                matmul(a, b.transposed(), &mut out, Into::Overwrite)?;
                *tile = out;
                Ok::<_, RouterError>(())
            })?;
            inverses.push(inverse);
        }
        Ok(Cholesky { lower: self, inverses })
    }
}

/// A factorised matrix.
pub(crate) struct Cholesky {
    lower: Symmetric,
    /// Inverses of the diagonal tiles of `lower`.
    inverses: Vec<Vec<f64>>,
}

impl Cholesky {
    /// Rows `X` with `X · A = rows`, for `A` the symmetric matrix and `rows: [n, width]`.
    pub fn solve(&self, rows: &[f64]) -> Result<Vec<f64>, RouterError> {
        let width = self.lower.width;
        let (n, count) = (rows.len() / width, tiles(width));
        // Columns of the right-hand side by tile: [n, rows of tile].
        let mut parts: Vec<Vec<f64>> = (0..count)
            .map(|i| {
                let at = tile_rows(i, width);
                rows.chunks_exact(width).flat_map(|r| r[at.clone()].to_vec()).collect()
            })
            .collect();
        for k in 0..count {
            parts[k] = self.diagonal(k, &parts[k], n, Half::Lower)?;
            for i in k + 1..count {
                let (left, right) = parts.split_at_mut(i);
                self.eliminate(i, k, &left[k], &mut right[0], n, Half::Lower)?;
            }
        }
        for k in (0..count).rev() {
            parts[k] = self.diagonal(k, &parts[k], n, Half::Upper)?;
            for i in 0..k {
                let (left, right) = parts.split_at_mut(k);
                self.eliminate(k, i, &right[0], &mut left[i], n, Half::Upper)?;
            }
        }
        let mut out = vec![0.0; n * width];
        for (i, part) in parts.iter().enumerate() {
            let at = tile_rows(i, width);
            for (out, part) in out.chunks_exact_mut(width).zip(part.chunks_exact(at.len())) {
                out[at.clone()].copy_from_slice(part);
            }
        }
        Ok(out)
    }

    /// `part · L_kk⁻ᵀ` or `part · L_kk⁻¹`.
    fn diagonal(
        &self,
        k: usize,
        part: &[f64],
        n: usize,
        half: Half,
    ) -> Result<Vec<f64>, RouterError> {
        let size = self.lower.size(k);
        let mut out = vec![0.0; n * size];
        let inverse = Dense::new(&self.inverses[k], size, size)?;
        let inverse = if half == Half::Lower { inverse.transposed() } else { inverse };
        matmul(Dense::new(part, n, size)?, inverse, &mut out, Into::Overwrite)?;
        Ok(out)
    }

    /// Takes what is known, through tile `(i, k)`, from what is not known yet.
    fn eliminate(
        &self,
        i: usize,
        k: usize,
        known: &[f64],
        open: &mut [f64],
        n: usize,
        half: Half,
    ) -> Result<(), RouterError> {
        let tile =
            Dense::new(&self.lower.columns[k][i - k], self.lower.size(i), self.lower.size(k))?;
        let (tile, inner) = match half {
            Half::Lower => (tile.transposed(), self.lower.size(k)),
            Half::Upper => (tile, self.lower.size(i)),
        };
        let mut product = vec![0.0; open.len()];
        matmul(Dense::new(known, n, inner)?, tile, &mut product, Into::Overwrite)?;
        open.iter_mut().zip(&product).for_each(|(v, p)| *v -= p);
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Lower,
    Upper,
}

/// `L` of one tile `[n, n]` in place; zeros above the diagonal.
fn factor_tile(tile: &mut [f64], n: usize, floor: f64) {
    for i in 0..n {
        for j in 0..=i {
            let (above, row) = tile.split_at_mut(i * n);
            let sum = if j < i {
                dot(&row[..j], &above[j * n..j * n + j])
            } else {
                dot(&row[..j], &row[..j])
            };
            let left = row[j] - sum;
            row[j] = if j < i { left / above[j * n + j] } else { left.max(floor).sqrt() };
        }
        tile[i * n + i + 1..(i + 1) * n].fill(0.0);
    }
}

/// The inverse of a lower triangular tile `[n, n]`.
fn invert_tile(lower: &[f64], n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    for i in 0..n {
        let (above, rest) = out.split_at_mut(i * n);
        let row = &mut rest[..n];
        let factor = 1.0 / lower[i * n + i];
        for (k, above) in above.chunks_exact(n).enumerate() {
            let l = lower[i * n + k];
            row[..=k].iter_mut().zip(above).for_each(|(r, a)| *r -= l * a);
        }
        row[..i].iter_mut().for_each(|r| *r *= factor);
        row[i] = factor;
    }
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 4];
    let (mut ca, mut cb) = (a.chunks_exact(4), b.chunks_exact(4));
    for (a, b) in ca.by_ref().zip(cb.by_ref()) {
        (0..4).for_each(|lane| sums[lane] += a[lane] * b[lane]);
    }
    let rest: f64 = ca.remainder().iter().zip(cb.remainder()).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_full(full: &[f64], width: usize) -> Symmetric {
        Symmetric::from_tiles(width, |i, k| {
            tile_rows(i, width)
                .flat_map(|r| tile_rows(k, width).map(move |c| full[r * width + c]))
                .collect()
        })
    }

    #[test]
    fn solution_by_hand() {
        // (4 2; 2 5) = L Lᵀ with L = (2 0; 1 2); X A = (8 14) has X = (1/2)(2.. ): 4x + 2y = 8, 2x + 5y = 14.
        let a = from_full(&[4.0, 2.0, 2.0, 5.0], 2);
        assert_eq!((a.trace(), a.full()), (9.0, vec![4.0, 2.0, 2.0, 5.0]));
        let factor = a.cholesky().unwrap();
        assert_eq!(factor.lower.columns[0][0], [2.0, 0.0, 1.0, 2.0]);
        let x = factor.solve(&[8.0, 14.0]).unwrap();
        assert!((x[0] - 0.75).abs() < 1e-15 && (x[1] - 2.5).abs() < 1e-15, "{x:?}");
    }

    #[test]
    fn solves_at_sizes_around_a_tile() {
        for width in [1, TILE - 1, TILE, TILE + 1, 3 * TILE + 7] {
            let noise = crate::estimators::random::gate(2 * width + 3, width, 1, 0);
            let x: Vec<f64> = noise.rows.iter().map(|&v| f64::from(v)).collect();
            let view = Dense::new(&x, 2 * width + 3, width).unwrap();
            let mut full = vec![0.0; width * width];
            matmul(view.transposed(), view, &mut full, Into::Overwrite).unwrap();
            let mut a = from_full(&full, width);
            a.add_to_diagonal(0.5);
            a.scale(2.0);
            let b = &x[..3 * width];
            let found = a.clone().cholesky().unwrap().solve(b).unwrap();
            let mut back = vec![0.0; 3 * width];
            let found = Dense::new(&found, 3, width).unwrap();
            matmul(found, Dense::new(&a.full(), width, width).unwrap(), &mut back, Into::Overwrite)
                .unwrap();
            assert!(back.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-11), "{width}");
        }
    }

    #[test]
    fn products_are_taken_away() {
        let mut a = from_full(&[5.0, 1.0, 1.0, 5.0], 2);
        a.subtract_product(&[1.0, 2.0], &[1.0, 2.0]).unwrap();
        assert_eq!(a.full(), [4.0, -1.0, -1.0, 1.0]);
    }

    #[test]
    fn a_pivot_that_rounding_ate_stays_finite() {
        let x = from_full(&[1.0; 9], 3).cholesky().unwrap().solve(&[1.0, 1.0, 1.0]).unwrap();
        assert!(x.iter().all(|v| v.is_finite()));
    }
}

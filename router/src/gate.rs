//! The matrix a router is.

use crate::eigen;

/// A router's weight: logits of a token are `z · rowsᵀ`, without bias.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gate {
    /// Rows.
    pub experts: usize,
    /// Columns.
    pub hidden: usize,
    /// `[experts, hidden]`, row-major.
    pub rows: Vec<f32>,
}

impl Gate {
    pub(crate) fn from_f64(experts: usize, hidden: usize, rows: &[f64]) -> Self {
        Self { experts, hidden, rows: rows.iter().map(|&v| v as f32).collect() }
    }

    /// The row of `expert`: `[hidden]`.
    pub fn row(&self, expert: usize) -> &[f32] {
        &self.rows[expert * self.hidden..(expert + 1) * self.hidden]
    }

    /// Logits of one router input `z: [hidden]`, accumulated in f64: `[experts]`.
    pub fn logits(&self, z: &[f32]) -> Vec<f64> {
        (0..self.experts)
            .map(|e| {
                self.row(e).iter().zip(z).map(|(&w, &v)| f64::from(w) * f64::from(v)).sum::<f64>()
            })
            .collect()
    }

    /// `σ_max / σ_min` of the rows, from the eigenvalues of `W · Wᵀ` (Jacobi); infinite when they are dependent.
    ///
    /// mergekit calls gates above 5 degenerate: rows that point nearly the same way. A gate whose rows sum to zero (as
    /// those of `logistic` do) is dependent by construction and routes well all the same; ask this only of the modes
    /// that scale each row to norm 1.
    pub fn condition(&self) -> f64 {
        let n = self.experts;
        let mut gram = vec![0f64; n * n]; // [experts, experts]
        for a in 0..n {
            for b in 0..n {
                gram[a * n + b] = self
                    .row(a)
                    .iter()
                    .zip(self.row(b))
                    .map(|(&x, &y)| f64::from(x) * f64::from(y))
                    .sum();
            }
        }
        let values = eigen::symmetric(gram, n);
        let largest = values.iter().copied().fold(0.0, f64::max);
        let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
        // Below this the smallest eigenvalue is rounding of the f32 rows.
        if smallest <= largest * f64::from(f32::EPSILON).powi(2) {
            f64::INFINITY
        } else {
            (largest / smallest).sqrt()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn condition_by_hand() {
        let gate = |rows: &[f32]| Gate { experts: 2, hidden: 2, rows: rows.to_vec() };
        assert!((gate(&[1.0, 0.0, 0.0, 1.0]).condition() - 1.0).abs() < 1e-12);
        assert!((gate(&[3.0, 0.0, 0.0, 0.5]).condition() - 6.0).abs() < 1e-12);
        // Rows of norm 1 at cosine 0.8: eigenvalues 1.8 and 0.2, ratio 9, condition 3.
        assert!((gate(&[1.0, 0.0, 0.8, 0.6]).condition() - 3.0).abs() < 1e-6);
        assert_eq!(gate(&[1.0, 2.0, 1.0, 2.0]).condition(), f64::INFINITY);
        assert_eq!(gate(&[0.0; 4]).condition(), f64::INFINITY);
    }

    #[test]
    fn logits_are_dot_products() {
        let gate = Gate { experts: 2, hidden: 2, rows: vec![1.0, 2.0, -1.0, 0.5] };
        assert_eq!(gate.logits(&[3.0, 4.0]), [11.0, -1.0]);
    }
}

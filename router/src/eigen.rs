//! Eigenvalues of small symmetric matrices.

/// Eigenvalues of the symmetric `matrix: [n, n]`, unsorted, by cyclic Jacobi rotations in f64.
///
/// Meant for matrices of experts by experts (at most a few hundred).
pub(crate) fn symmetric(mut matrix: Vec<f64>, n: usize) -> Vec<f64> {
    let scale: f64 = matrix.iter().map(|v| v * v).sum::<f64>();
    // Jacobi converges quadratically; ten sweeps are plenty for any size met here, the bound guards against NaN.
    for _ in 0..60 {
        let mut off = 0.0;
        for p in 0..n {
            for q in p + 1..n {
                off += matrix[p * n + q] * matrix[p * n + q];
            }
        }
        if off.is_nan() || off <= scale * 1e-32 {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut matrix, n, p, q);
            }
        }
    }
    (0..n).map(|i| matrix[i * n + i]).collect()
}

/// One rotation in the plane (p, q) that makes the entry there zero.
fn rotate(a: &mut [f64], n: usize, p: usize, q: usize) {
    let apq = a[p * n + q];
    if apq == 0.0 {
        return;
    }
    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let c = 1.0 / (t * t + 1.0).sqrt();
    let s = t * c;
    for k in 0..n {
        let (x, y) = (a[k * n + p], a[k * n + q]);
        a[k * n + p] = c * x - s * y;
        a[k * n + q] = s * x + c * y;
    }
    for k in 0..n {
        let (x, y) = (a[p * n + k], a[q * n + k]);
        a[p * n + k] = c * x - s * y;
        a[q * n + k] = s * x + c * y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_by_two_by_hand() {
        let mut values = symmetric(vec![2.0, 1.0, 1.0, 2.0], 2);
        values.sort_by(f64::total_cmp);
        assert!((values[0] - 1.0).abs() < 1e-14 && (values[1] - 3.0).abs() < 1e-14);
    }

    #[test]
    fn ones_have_one_eigenvalue() {
        let mut values = symmetric(vec![1.0; 64], 8);
        values.sort_by(f64::total_cmp);
        assert!((values[7] - 8.0).abs() < 1e-12 && values[6].abs() < 1e-12);
    }
}

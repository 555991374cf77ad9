//! Eigenvalues and eigenvectors of symmetric matrices, in f64.

use crate::error::KernelError;

/// Eigenvalues of a symmetric matrix, largest first, with their eigenvectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Eigen {
    /// The eigenvalues, descending.
    pub values: Vec<f64>, // [n]
    /// Row `i` is the eigenvector of `values[i]`; rows are orthonormal.
    pub vectors: Vec<f64>, // [n, n]
}

/// Iterations per eigenvalue; three are usual, so that more than this means numbers that are not finite.
const MOST_ITERATIONS: usize = 90;

/// All eigenvalues and eigenvectors of the symmetric `matrix: [n, n]`.
///
/// Householder reflections to tridiagonal form, then QL steps with implicit shifts: about `9 n^3` operations, on one
/// thread. Only the lower triangle is read.
///
/// # Errors
/// [`KernelError::Length`] if `matrix` is not square of size `n`, [`KernelError::Diverged`] if it holds numbers that are
/// not finite.
///
/// # Source
/// Golub and Van Loan, Matrix Computations, sections 8.3.1 and 8.3.5.
pub fn symmetric_eigen(mut matrix: Vec<f64>, n: usize) -> Result<Eigen, KernelError> {
    KernelError::check("symmetric matrix", n * n, matrix.len())?;
    if n == 0 {
        return Ok(Eigen { values: Vec::new(), vectors: Vec::new() });
    }
    let reflections = tridiagonalise(&mut matrix, n);
    let mut diagonal: Vec<f64> = (0..n).map(|i| matrix[i * n + i]).collect();
    let mut beside: Vec<f64> = (1..n).map(|i| matrix[i * n + i - 1]).chain([0.0]).collect();
    let mut vectors = rotated_identity(&reflections, n);
    implicit_ql(&mut diagonal, &mut beside, &mut vectors)?;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
    Ok(Eigen {
        values: order.iter().map(|&i| diagonal[i]).collect(),
        vectors: order.iter().flat_map(|&i| vectors[i * n..(i + 1) * n].to_vec()).collect(),
    })
}

/// A reflection `1 - v v^T` with `|v|^2 = 2`, acting on coordinates from `from` on; an empty `v` is the identity.
struct Reflection {
    from: usize,
    v: Vec<f64>,
}

/// Brings `matrix` into tridiagonal form from its first column to its last, and returns the reflections in this order.
fn tridiagonalise(matrix: &mut [f64], n: usize) -> Vec<Reflection> {
    let mut reflections = Vec::new();
    for k in 0..n.saturating_sub(2) {
        let from = k + 1;
        let mut v: Vec<f64> = (from..n).map(|i| matrix[i * n + k]).collect();
        let scale = v.iter().fold(0f64, |m, x| m.max(x.abs()));
        let length = scale * v.iter().map(|x| (x / scale).powi(2)).sum::<f64>().sqrt();
        // A column that is in form already, or numbers that are not finite, which the QL steps find.
        if !(v[1..].iter().any(|x| *x != 0.0) && length.is_finite()) {
            reflections.push(Reflection { from, v: Vec::new() });
            continue;
        }
        let end = if v[0] > 0.0 { -length } else { length };
        v[0] -= end;
        // |v|^2 = 2 length (length + |first|), without the overflow of squares.
        let factor = (1.0 / length).sqrt() / (length + (v[0] + end).abs()).sqrt();
        v.iter_mut().for_each(|x| *x *= factor);
        reflect_both_sides(matrix, n, from, &v);
        matrix[from * n + k] = end;
        (from + 1..n).for_each(|i| matrix[i * n + k] = 0.0);
        reflections.push(Reflection { from, v });
    }
    reflections
}

/// `A <- H A H` for the block from `from` on, lower triangle: `A - v w^T - w v^T`, `w = A v - (v^T A v / 2) v`.
fn reflect_both_sides(matrix: &mut [f64], n: usize, from: usize, v: &[f64]) {
    let size = v.len();
    let mut w = vec![0.0; size];
    for i in 0..size {
        let row = &matrix[(from + i) * n + from..][..=i];
        let (below, own) = row.split_at(i);
        w[i] += dot(below, &v[..i]) + own[0] * v[i];
        below.iter().zip(&mut w[..i]).for_each(|(a, w)| *w += a * v[i]);
    }
    let half = 0.5 * dot(&w, v);
    w.iter_mut().zip(v).for_each(|(w, v)| *w -= half * v);
    for i in 0..size {
        let row = &mut matrix[(from + i) * n + from..][..=i];
        let (vi, wi) = (v[i], w[i]);
        row.iter_mut().zip(v).zip(&w).for_each(|((a, v), w)| *a -= vi * w + wi * v);
    }
}

/// `Q^T` of `A = Q T Q^T`: the reflections multiplied up, the last one leftmost.
fn rotated_identity(reflections: &[Reflection], n: usize) -> Vec<f64> {
    let mut rows = vec![0.0; n * n];
    (0..n).for_each(|i| rows[i * n + i] = 1.0);
    for reflection in reflections.iter().rev().filter(|r| !r.v.is_empty()) {
        // Rows above are still unit vectors outside of the reach of this reflection.
        for row in rows.chunks_exact_mut(n).skip(reflection.from) {
            let row = &mut row[reflection.from..];
            let along = dot(row, &reflection.v);
            row.iter_mut().zip(&reflection.v).for_each(|(r, v)| *r -= along * v);
        }
    }
    rows
}

/// Makes the tridiagonal matrix diagonal; each rotation is done to the rows of `vectors` too.
fn implicit_ql(d: &mut [f64], e: &mut [f64], vectors: &mut [f64]) -> Result<(), KernelError> {
    let n = d.len();
    for l in 0..n {
        for iteration in 0.. {
            let small = |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[*m + 1].abs());
            let m = (l..n - 1).find(small).unwrap_or(n - 1);
            if m == l {
                break;
            }
            if iteration == MOST_ITERATIONS {
                return Err(KernelError::Diverged { what: "eigenvalues of a symmetric matrix" });
            }
            ql_step(d, e, vectors, l, m);
        }
    }
    match d.iter().all(|v| v.is_finite()) {
        true => Ok(()),
        false => Err(KernelError::Diverged { what: "eigenvalues of a symmetric matrix" }),
    }
}

/// One QL step on the block from `l` to `m`.
fn ql_step(d: &mut [f64], e: &mut [f64], vectors: &mut [f64], l: usize, m: usize) {
    let n = d.len();
    let g = (d[l + 1] - d[l]) / (2.0 * e[l]);
    let r = g.hypot(1.0);
    let mut g = d[m] - d[l] + e[l] / (g + r.copysign(g));
    let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
    for i in (l..m).rev() {
        let (f, b) = (s * e[i], c * e[i]);
        let r = f.hypot(g);
        e[i + 1] = r;
        if r == 0.0 {
            // The block falls apart here; what is left is done in the next steps.
            d[i + 1] -= p;
            e[m] = 0.0;
            return;
        }
        (s, c) = (f / r, g / r);
        g = d[i + 1] - p;
        let r = (d[i] - g) * s + 2.0 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
        let (upper, lower) = vectors[i * n..(i + 2) * n].split_at_mut(n);
        for (x, y) in upper.iter_mut().zip(lower) {
            (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
        }
    }
    d[l] -= p;
    e[l] = g;
    e[m] = 0.0;
}

/// Sum of products in eight lanes: a fixed order that the compiler can vectorise.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0f64; 8];
    let (mut a8, mut b8) = (a.chunks_exact(8), b.chunks_exact(8));
    for (a, b) in a8.by_ref().zip(b8.by_ref()) {
        (0..8).for_each(|i| lanes[i] += a[i] * b[i]);
    }
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, count: usize) -> Vec<f64> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn two_by_two_by_hand() {
        let found = symmetric_eigen(vec![2.0, 1.0, 1.0, 2.0], 2).unwrap();
        assert!((found.values[0] - 3.0).abs() < 1e-15 && (found.values[1] - 1.0).abs() < 1e-15);
        let half = 0.5f64.sqrt();
        assert!(found.vectors.iter().all(|v| (v.abs() - half).abs() < 1e-15));
        assert_eq!(symmetric_eigen(vec![7.0], 1).unwrap().values, [7.0]);
        assert!(symmetric_eigen(Vec::new(), 0).unwrap().values.is_empty());
    }

    /// Size, what the matrix is, how its entry `(i, j)` with `j <= i` is made.
    fn check(n: usize, entry: impl Fn(usize, usize) -> f64) {
        let mut matrix = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                (matrix[i * n + j], matrix[j * n + i]) = (entry(i, j), entry(i, j));
            }
        }
        let scale = matrix.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs())) * n as f64;
        let Eigen { values, vectors } = symmetric_eigen(matrix.clone(), n).unwrap();
        assert!(values.windows(2).all(|w| w[0] >= w[1]));
        let row = |i: usize| &vectors[i * n..(i + 1) * n];
        for (i, value) in values.iter().enumerate() {
            for j in 0..=i {
                let expected = if i == j { 1.0 } else { 0.0 };
                assert!((dot(row(i), row(j)) - expected).abs() < 1e-12, "{n}: {i} {j}");
            }
            for (k, line) in matrix.chunks_exact(n).enumerate() {
                let residual = dot(line, row(i)) - value * row(i)[k];
                assert!(residual.abs() < 1e-13 * scale, "{n}: {residual} of {scale}");
            }
        }
    }

    #[test]
    fn vectors_are_orthonormal_and_eigen() {
        for n in [1, 2, 3, 4, 7, 30, 65] {
            let values = noise(n as u64, n * n);
            check(n, |i, j| values[i * n + j]);
            check(n, |i, j| 1e30 * values[i * n + j]);
        }
        check(9, |_, _| 0.0);
        check(9, |_, _| 1.0);
        check(9, |i, j| if i == j { i as f64 } else { 0.0 });
        check(12, |i, j| 10f64.powi(-((i + j) as i32)));
        // Two blocks that do not know each other.
        check(10, |i, j| if (i < 5) == (j < 5) { 1.0 + (i * j) as f64 } else { 0.0 });
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        for n in [1, 2, 5] {
            let mut matrix = noise(1, n * n);
            matrix[n * n - 1] = f64::NAN;
            let error = symmetric_eigen(matrix, n).unwrap_err();
            assert!(matches!(error, KernelError::Diverged { .. }), "{error}");
        }
        assert!(symmetric_eigen(vec![0.0; 5], 2).is_err());
    }
}

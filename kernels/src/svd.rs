//! The largest singular values of a matrix, with their vectors.

use crate::dense::{Dense, Into, matmul};
use crate::eigen::{Eigen, dot, symmetric_eigen};
use crate::error::KernelError;

/// `A = sum_i u_i sigma_i v_i^T`, cut after the largest `sigma`.
#[derive(Debug, Clone, PartialEq)]
pub struct Svd {
    /// Singular values, descending; zeros are left out.
    pub values: Vec<f64>, // [rank]
    /// Row `i` is `u_i`, of length 1.
    pub left: Vec<f32>, // [rank, rows]
    /// Row `i` is `v_i`, of length 1.
    pub right: Vec<f32>, // [rank, cols]
    /// `|A|^2`, the sum of the squares of all singular values.
    pub energy: f64,
}

/// Up to this size of the smaller side the whole spectrum is found; beyond it, what is asked for.
const SMALL: usize = 192;

/// Columns of a Gram matrix that are widened at a time.
const PANEL: usize = 1024;

/// Extra directions that subspace iteration keeps beside those asked for, at least.
const MARGIN: usize = 16;

/// Subspace iteration ends when the energy that it has found grows by less than this share.
const TOLERANCE: f64 = 1e-7;

/// And in any case after so many steps: a flat spectrum has no directions that stand out.
const MOST_STEPS: usize = 60;

/// The `rank` largest singular values of `matrix: [rows, cols]` and their vectors; fewer where the others are zero.
///
/// `u_i` are orthonormal to f64 before they are rounded, and `sigma_i v_i = A^T u_i`, so that the sum is always the
/// projection of `A` onto the span of the `u_i` (of the `v_i`, if `cols < rows`). If the smaller side is small or `rank`
/// is a good part of it, the directions are exact: eigenvectors of a Gram matrix in f64. Else they come from subspace
/// iteration with `2 rank` directions, ended when the energy found grows by less than 1e-7 of itself. One thread; the
/// same numbers every time.
///
/// # Errors
/// [`KernelError::Length`] if `matrix` has another size, [`KernelError::Diverged`] if it is not finite.
///
/// # Source
/// Halko, Martinsson, Tropp 2011, Finding structure with randomness, algorithm 4.4, with a test for convergence.
pub fn truncated_svd(
    matrix: &[f32],
    rows: usize,
    cols: usize,
    rank: usize,
) -> Result<Svd, KernelError> {
    let whole = Dense::new(matrix, rows, cols)?;
    let energy = matrix.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    if !energy.is_finite() {
        return Err(KernelError::Diverged { what: "singular values" });
    }
    let (small, large) = (rows.min(cols), rows.max(cols));
    let rank = rank.min(small);
    if rank == 0 || energy == 0.0 {
        return Ok(Svd { values: Vec::new(), left: Vec::new(), right: Vec::new(), energy });
    }
    // The rows of `a` are the smaller side.
    let a = if rows <= cols { whole } else { whole.transposed() };
    let directions = match small <= SMALL || 4 * (rank + MARGIN) >= small {
        true => leading(gram(matrix, rows, cols)?, small, rank)?,
        false => subspace(a, small, large, rank)?,
    };
    let near: Vec<f32> = directions.iter().map(|v| *v as f32).collect(); // [rank, small]
    let mut far = vec![0f32; rank * large];
    matmul(Dense::new(&near, rank, small)?, a, &mut far, Into::Overwrite)?;
    Ok(sorted(&near, &far, [small, large], rows <= cols, energy))
}

/// Lengths of `far`, which become the singular values, in descending order.
fn sorted(
    near: &[f32],
    far: &[f32],
    [small, large]: [usize; 2],
    near_is_left: bool,
    energy: f64,
) -> Svd {
    let length = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let mut order: Vec<(f64, usize)> =
        far.chunks_exact(large).map(length).enumerate().map(|(i, s)| (s, i)).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    // What is below the rounding of the products is no direction of the matrix.
    let floor = order[0].0 * f64::from(f32::EPSILON) * (large as f64).sqrt();
    order.retain(|(s, _)| *s > floor);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for &(value, i) in &order {
        let near = &near[i * small..(i + 1) * small];
        let peak = near.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
        let sign = if peak < 0.0 { -1.0 } else { 1.0 };
        left.extend(near.iter().map(|x| sign * x));
        let scale = f64::from(sign) / value;
        right
            .extend(far[i * large..(i + 1) * large].iter().map(|x| (scale * f64::from(*x)) as f32));
    }
    if !near_is_left {
        std::mem::swap(&mut left, &mut right);
    }
    Svd { values: order.into_iter().map(|(s, _)| s).collect(), left, right, energy }
}

/// The eigenvectors of the `rank` largest eigenvalues.
fn leading(gram: Vec<f64>, size: usize, rank: usize) -> Result<Vec<f64>, KernelError> {
    let Eigen { mut vectors, .. } = symmetric_eigen(gram, size)?;
    vectors.truncate(rank * size);
    Ok(vectors)
}

/// `A A^T` or `A^T A`, whichever is smaller, in f64.
fn gram(matrix: &[f32], rows: usize, cols: usize) -> Result<Vec<f64>, KernelError> {
    let small = rows.min(cols);
    let mut gram = vec![0.0; small * small];
    let mut panel = Vec::new();
    if rows <= cols {
        for from in (0..cols).step_by(PANEL) {
            let to = cols.min(from + PANEL);
            panel.clear();
            let lines = matrix.chunks_exact(cols);
            lines.for_each(|line| panel.extend(line[from..to].iter().map(|v| f64::from(*v))));
            let part = Dense::new(&panel, rows, to - from)?;
            matmul(part, part.transposed(), &mut gram, Into::Add)?;
        }
    } else {
        for lines in matrix.chunks(PANEL * cols) {
            panel.clear();
            panel.extend(lines.iter().map(|v| f64::from(*v)));
            let part = Dense::new(&panel, lines.len() / cols, cols)?;
            matmul(part.transposed(), part, &mut gram, Into::Add)?;
        }
    }
    Ok(gram)
}

/// The leading left directions of `a: [small, large]`, `[rank, small]`.
fn subspace(
    a: Dense<'_, f32>,
    small: usize,
    large: usize,
    rank: usize,
) -> Result<Vec<f64>, KernelError> {
    let width = small.min(rank + rank.max(MARGIN));
    let mut basis = noise(width * small); // [width, small]
    orthonormalise(&mut basis, small);
    let mut single = vec![0f32; width * small];
    let mut images = vec![0f32; width * large];
    let (mut found, mut steps) = (0.0, 0);
    loop {
        narrow(&basis, &mut single);
        matmul(Dense::new(&single, width, small)?, a, &mut images, Into::Overwrite)?;
        let Eigen { values, vectors } = symmetric_eigen(gram(&images, width, large)?, width)?;
        // Turned so that each row comes near to one direction: small ones then do not drown in the rounding of large ones.
        let turn = Dense::new(&vectors, width, width)?;
        let before = std::mem::replace(&mut basis, vec![0.0; width * small]);
        matmul(turn, Dense::new(&before, width, small)?, &mut basis, Into::Overwrite)?;
        let energy: f64 = values[..rank].iter().sum();
        steps += 1;
        if energy - found <= TOLERANCE * energy || steps == MOST_STEPS {
            basis.truncate(rank * small);
            return Ok(basis);
        }
        found = energy;
        let mut turn = vec![0f32; width * width];
        narrow(&vectors, &mut turn);
        let before = std::mem::replace(&mut images, vec![0.0; width * large]);
        let turn = Dense::new(&turn, width, width)?;
        matmul(turn, Dense::new(&before, width, large)?, &mut images, Into::Overwrite)?;
        let image = Dense::new(&images, width, large)?;
        matmul(image, a.transposed(), &mut single, Into::Overwrite)?;
        basis.iter_mut().zip(&single).for_each(|(b, s)| *b = f64::from(*s));
        orthonormalise(&mut basis, small);
    }
}

fn narrow(from: &[f64], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t = *f as f32);
}

/// Makes rows orthonormal: Gram and Schmidt, each row twice. A row that lies in the span of those before it is replaced.
fn orthonormalise(rows: &mut [f64], width: usize) {
    let mut spare = 0;
    for i in 0..rows.len() / width {
        let (done, rest) = rows.split_at_mut(i * width);
        let row = &mut rest[..width];
        loop {
            let before = dot(row, row).sqrt();
            for _ in 0..2 {
                for other in done.chunks_exact(width) {
                    let along = dot(row, other);
                    row.iter_mut().zip(other).for_each(|(r, o)| *r -= along * o);
                }
            }
            let length = dot(row, row).sqrt();
            if length > 1e-10 * before && length > 0.0 {
                row.iter_mut().for_each(|r| *r /= length);
                break;
            }
            // Unit vectors one after the other: one of them is outside of the span, which has fewer dimensions.
            row.fill(0.0);
            row[spare % width] = 1.0;
            spare += 1;
        }
    }
}

/// Numbers in `-1..1` that are the same every time (splitmix64).
fn noise(count: usize) -> Vec<f64> {
    let mut state = 0u64;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) >> 11
    };
    (0..count).map(|_| next() as f64 / (1u64 << 52) as f64 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sum_i u_i sigma_i v_i^T`
    fn product(svd: &Svd, rows: usize, cols: usize) -> Vec<f64> {
        let mut out = vec![0.0; rows * cols];
        for (i, value) in svd.values.iter().enumerate() {
            for r in 0..rows {
                for c in 0..cols {
                    let (u, v) = (svd.left[i * rows + r], svd.right[i * cols + c]);
                    out[r * cols + c] += value * f64::from(u) * f64::from(v);
                }
            }
        }
        out
    }

    fn single(values: &[f64]) -> Vec<f32> {
        values.iter().map(|v| *v as f32).collect()
    }

    /// What the sum leaves of the matrix, squared.
    fn left_over(matrix: &[f32], svd: &Svd, rows: usize, cols: usize) -> f64 {
        let sum = product(svd, rows, cols);
        matrix.iter().zip(sum).map(|(m, p)| (f64::from(*m) - p).powi(2)).sum()
    }

    #[test]
    fn by_hand() {
        // (3 0; 0 -2; 0 0): values 3 and 2.
        let svd = truncated_svd(&[3.0, 0.0, 0.0, -2.0, 0.0, 0.0], 3, 2, 2).unwrap();
        assert_eq!((svd.values.as_slice(), svd.energy), ([3.0, 2.0].as_slice(), 13.0));
        assert_eq!(svd.left, [1.0, 0.0, 0.0, 0.0, -1.0, 0.0]);
        assert_eq!(svd.right, [1.0, 0.0, 0.0, 1.0]);
        let first = truncated_svd(&[3.0, 0.0, 0.0, -2.0, 0.0, 0.0], 3, 2, 1).unwrap();
        assert_eq!((first.values.as_slice(), first.left.len()), ([3.0].as_slice(), 3));
    }

    #[test]
    fn the_rank_of_the_matrix_ends_the_list() {
        let (rows, cols) = (40, 30);
        let (u, v) = (noise(3 * rows), noise(3 * cols));
        let matrix: Vec<f32> = (0..rows * cols)
            .map(|i| (0..3).map(|k| u[k * rows + i / cols] * v[k * cols + i % cols]).sum::<f64>())
            .map(|x| x as f32)
            .collect();
        let svd = truncated_svd(&matrix, rows, cols, 20).unwrap();
        assert_eq!(svd.values.len(), 3);
        assert!(left_over(&matrix, &svd, rows, cols) < 1e-11 * svd.energy);
        let zeros = truncated_svd(&[0.0; 12], 3, 4, 2).unwrap();
        assert!(zeros.values.is_empty() && zeros.energy == 0.0);
        assert!(truncated_svd(&[1.0; 12], 3, 4, 0).unwrap().values.is_empty());
    }

    #[test]
    fn what_is_left_is_the_tail_of_the_spectrum() {
        for (rows, cols) in [(20, 33), (33, 20), (1, 9), (9, 1), (24, 24)] {
            let matrix = single(&noise(rows * cols));
            let all = truncated_svd(&matrix, rows, cols, rows.min(cols)).unwrap();
            assert!(left_over(&matrix, &all, rows, cols) < 1e-10 * all.energy);
            for rank in 1..rows.min(cols) {
                let cut = truncated_svd(&matrix, rows, cols, rank).unwrap();
                let tail: f64 = all.values[rank..].iter().map(|s| s * s).sum();
                let left = left_over(&matrix, &cut, rows, cols);
                assert!((left - tail).abs() < 1e-6 * all.energy, "{rows} {cols} {rank}");
            }
        }
    }

    /// A matrix of known singular values, `[rows, cols]`.
    fn with_spectrum(values: &[f64], rows: usize, cols: usize) -> Vec<f32> {
        let count = values.len();
        let (mut u, mut v) = (noise(count * rows), noise(count * cols + 1)[1..].to_vec());
        orthonormalise(&mut u, rows);
        orthonormalise(&mut v, cols);
        u.chunks_exact_mut(rows).zip(values).for_each(|(u, s)| u.iter_mut().for_each(|x| *x *= s));
        let mut out = vec![0.0; rows * cols];
        let (u, v) = (Dense::new(&u, count, rows).unwrap(), Dense::new(&v, count, cols).unwrap());
        matmul(u.transposed(), v, &mut out, Into::Overwrite).unwrap();
        single(&out)
    }

    #[test]
    fn iteration_finds_what_the_whole_spectrum_says() {
        let rank = 8;
        // Falling fast; falling slowly; two equal at the cut; rank below what is asked for.
        let fast: Vec<f64> = (0..200).map(|i| 0.8f64.powi(i)).collect();
        let slow: Vec<f64> = (0..200).map(|i| 1.0 / (1.0 + 0.02 * f64::from(i))).collect();
        let equal: Vec<f64> = (0..200).map(|i| if i < 20 { 1.0 } else { 0.1 }).collect();
        for (spectrum, tolerance) in
            [(fast, 1e-6), (slow, 1e-3), (equal, 1e-6), (vec![2.0; 3], 1e-6)]
        {
            for (rows, cols) in [(260, 300), (300, 260)] {
                let matrix = with_spectrum(&spectrum, rows, cols);
                let found = truncated_svd(&matrix, rows, cols, rank).unwrap();
                let kept: f64 = found.values.iter().map(|s| s * s).sum();
                let best: f64 = spectrum.iter().take(rank).map(|s| s * s).sum();
                assert!((kept / best - 1.0).abs() < tolerance, "{kept} of {best}");
                let left = left_over(&matrix, &found, rows, cols);
                assert!((left + kept - found.energy).abs() < 1e-6 * found.energy);
            }
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        let error = truncated_svd(&[1.0, f32::NAN], 1, 2, 1).unwrap_err();
        assert_eq!(error, KernelError::Diverged { what: "singular values" });
        assert!(truncated_svd(&[1.0; 5], 2, 2, 1).is_err());
    }
}

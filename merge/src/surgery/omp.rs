//! Orthogonal matching pursuit: a vector as a sum of few others.

use moe_merge_kernels::dense::{Dense, Into, matmul};
use rayon::prelude::*;

/// Some rows of a dictionary with their coefficients.
pub(super) type Combination = Vec<(usize, f32)>;

/// Targets that are worked on together: one product gives the scores of all of them.
const TARGETS: usize = 64;

/// A row this near to the span of those before it adds nothing.
const FLOOR: f64 = 1e-8;

/// For each of `targets: [n, width]` at most `k` rows of `dictionary: [rows, width]` and their coefficients, and what is
/// left of the target's length, as a share of it.
///
/// Each step takes the row with the largest `|<residual, row>|` (rows as they are, not normalised) that is not used yet,
/// orthogonalises it against those before, and takes its direction off the residual; at last `c = R^-1 Q^T y`. Products
/// with the dictionary in f32, everything else summed in f64. `stop` is asked before every step of every group of targets.
///
/// # Source
/// Pati, Rezaiifar, Krishnaprasad 1993; mergekit `tokensurgeon`, method `omp`.
pub(super) fn pursue(
    targets: &[f32],
    dictionary: &[f32],
    width: usize,
    k: usize,
    stop: &(dyn Fn() -> bool + Sync),
    progress: &(dyn Fn(u64) + Sync),
) -> Vec<(Combination, f64)> {
    if width == 0 {
        return Vec::new();
    }
    let groups: Vec<&[f32]> = targets.chunks(TARGETS * width).collect();
    let found: Vec<Vec<(Combination, f64)>> = groups
        .into_par_iter()
        .map(|group| {
            let found = pursue_group(group, dictionary, width, k, stop);
            progress(found.len() as u64);
            found
        })
        .collect();
    found.concat()
}

/// What is known about one target.
struct Pursuit {
    /// Rows used, in order.
    rows: Vec<usize>,
    /// Orthonormal directions, `[used, width]`.
    basis: Vec<f64>,
    /// `R` by columns: column `i` has `i + 1` numbers.
    upper: Vec<Vec<f64>>,
    /// `Q^T y`
    along: Vec<f64>,
    residual: Vec<f64>,
    done: bool,
}

fn pursue_group(
    group: &[f32],
    dictionary: &[f32],
    width: usize,
    k: usize,
    stop: &(dyn Fn() -> bool + Sync),
) -> Vec<(Combination, f64)> {
    let (count, rows) = (group.len() / width, dictionary.len() / width);
    let mut all: Vec<Pursuit> = group.chunks_exact(width).map(Pursuit::new).collect();
    let mut residuals = group.to_vec();
    let mut scores = vec![0f32; count * rows];
    for _ in 0..k.min(rows) {
        if stop() || all.iter().all(|p| p.done) {
            break;
        }
        let product = Dense::new(&residuals, count, width).and_then(|r| {
            let d = Dense::new(dictionary, rows, width)?;
            matmul(r, d.transposed(), &mut scores, Into::Overwrite)
        });
        debug_assert!(product.is_ok(), "both have the same width");
        let lines = scores.chunks_exact(rows.max(1)).zip(residuals.chunks_exact_mut(width));
        for (pursuit, (scores, residual)) in all.iter_mut().zip(lines) {
            pursuit.step(scores, dictionary, width);
            residual.iter_mut().zip(&pursuit.residual).for_each(|(to, v)| *to = *v as f32);
        }
    }
    all.into_iter().zip(group.chunks_exact(width)).map(|(p, target)| p.finish(target)).collect()
}

impl Pursuit {
    fn new(target: &[f32]) -> Self {
        let residual: Vec<f64> = target.iter().map(|v| f64::from(*v)).collect();
        let done = residual.iter().all(|v| *v == 0.0);
        let (rows, basis, upper, along) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { rows, basis, upper, along, residual, done }
    }

    fn step(&mut self, scores: &[f32], dictionary: &[f32], width: usize) {
        if self.done {
            return;
        }
        let unused = scores.iter().enumerate().filter(|(row, _)| !self.rows.contains(row));
        let best = unused.fold(None, |best: Option<(usize, f32)>, (row, s)| match best {
            Some((_, most)) if s.abs() <= most => best,
            _ => Some((row, s.abs())),
        });
        let Some((row, most)) = best.filter(|(_, most)| *most > 0.0) else {
            self.done = true;
            return;
        };
        debug_assert!(most.is_finite(), "numbers of a checkpoint are finite");
        let atom: Vec<f64> =
            dictionary[row * width..(row + 1) * width].iter().map(|v| f64::from(*v)).collect();
        let length = dot(&atom, &atom).sqrt();
        let mut direction = atom;
        let mut column = vec![0.0; self.rows.len() + 1];
        // Twice: once leaves the rounding of long vectors.
        for _ in 0..2 {
            for (q, r) in self.basis.chunks_exact(width).zip(&mut column) {
                let along = dot(q, &direction);
                *r += along;
                direction.iter_mut().zip(q).for_each(|(d, q)| *d -= along * q);
            }
        }
        let left = dot(&direction, &direction).sqrt();
        if left <= FLOOR * length {
            self.done = true;
            return;
        }
        direction.iter_mut().for_each(|d| *d /= left);
        let last = self.rows.len();
        column[last] = left;
        let along = dot(&direction, &self.residual);
        self.residual.iter_mut().zip(&direction).for_each(|(r, d)| *r -= along * d);
        self.rows.push(row);
        self.upper.push(column);
        self.along.push(along);
        self.basis.extend(direction);
    }

    /// Solves `R c = Q^T y`.
    fn finish(self, target: &[f32]) -> (Combination, f64) {
        let n = self.rows.len();
        let mut c = self.along;
        for i in (0..n).rev() {
            c[i] /= self.upper[i][i];
            let (before, rest) = c.split_at_mut(i);
            before.iter_mut().zip(&self.upper[i]).for_each(|(b, r)| *b -= rest[0] * r);
        }
        let whole: f64 = target.iter().map(|v| f64::from(*v).powi(2)).sum();
        let left = dot(&self.residual, &self.residual);
        let share = if whole > 0.0 { (left / whole).sqrt() } else { 0.0 };
        (self.rows.into_iter().zip(c.into_iter().map(|c| c as f32)).collect(), share)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0f64; 4];
    let (mut a4, mut b4) = (a.chunks_exact(4), b.chunks_exact(4));
    for (a, b) in a4.by_ref().zip(b4.by_ref()) {
        (0..4).for_each(|i| lanes[i] += a[i] * b[i]);
    }
    let rest: f64 = a4.remainder().iter().zip(b4.remainder()).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(targets: &[f32], dictionary: &[f32], width: usize, k: usize) -> Vec<(Combination, f64)> {
        pursue(targets, dictionary, width, k, &|| false, &|_| {})
    }

    #[test]
    fn by_hand() {
        // Rows (2 0), (1 1), (0 1); target (2 3): scores 4, 5, 3; then what is left is (-0.5 0.5): scores -1, -, 0.5.
        let dictionary = [2.0, 0.0, 1.0, 1.0, 0.0, 1.0];
        let found = run(&[2.0, 3.0], &dictionary, 2, 1);
        assert_eq!(found[0].0, [(1, 2.5)]);
        assert!((found[0].1 - (0.5f64 / 13.0).sqrt()).abs() < 1e-12);
        let found = run(&[2.0, 3.0, 0.0, 0.0], &dictionary, 2, 3);
        assert_eq!(found[0].0, [(1, 3.0), (0, -0.5)]);
        assert!(found[0].1 < 1e-12);
        // Nothing of nothing.
        assert_eq!(found[1], (Vec::new(), 0.0));
    }

    /// Numbers from -1 to 1 that follow from each other in no way a sum of rows could show.
    fn noise(count: usize) -> Vec<f32> {
        let hash = |i: usize| {
            let mixed = (i as u32 + 1).wrapping_mul(2_654_435_761);
            let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519);
            mixed ^ (mixed >> 13)
        };
        (0..count).map(|i| hash(i) as f32 / u32::MAX as f32 * 2.0 - 1.0).collect()
    }

    #[test]
    fn sums_of_few_rows_are_found() {
        let (width, rows) = (48, 120);
        let dictionary = noise(rows * width + width).split_off(width);
        let row = |r: usize| &dictionary[r * width..(r + 1) * width];
        let target: Vec<f32> = (0..width).map(|i| 3.0 * row(7)[i] - 2.0 * row(90)[i]).collect();
        let targets: Vec<f32> = (0..70).flat_map(|_| target.clone()).collect();
        let found = run(&targets, &dictionary, width, 64);
        assert_eq!(found.len(), 70);
        for (combination, left) in &found {
            assert!(*left < 1e-5, "{left}");
            assert_eq!(combination, &found[0].0);
        }
        // With as many rows as dimensions, everything.
        let (combination, left) = &run(&noise(width), &dictionary, width, width)[0];
        assert!(*left < 1e-5 && combination.len() <= width);
        // More rows never leave more.
        let left = |k| run(&noise(width), &dictionary, width, k)[0].1;
        assert!((1..12).all(|k| left(k + 1) <= left(k)));
    }

    #[test]
    fn the_residual_is_what_the_combination_leaves() {
        let (width, rows) = (16, 30);
        let dictionary = noise(rows * width);
        let target = noise(width + 5)[5..].to_vec();
        let (combination, left) = &run(&target, &dictionary, width, 5)[0];
        let mut rest: Vec<f64> = target.iter().map(|v| f64::from(*v)).collect();
        for (row, c) in combination {
            let atom = &dictionary[row * width..(row + 1) * width];
            rest.iter_mut().zip(atom).for_each(|(r, a)| *r -= f64::from(*c) * f64::from(*a));
        }
        let whole: f64 = target.iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!(((dot(&rest, &rest) / whole).sqrt() - left).abs() < 1e-5);
        // Least squares: what is left is at right angles to every row used.
        for (row, _) in combination {
            let atom: Vec<f64> =
                dictionary[row * width..(row + 1) * width].iter().map(|v| f64::from(*v)).collect();
            assert!(dot(&atom, &rest).abs() < 1e-4);
        }
    }
}

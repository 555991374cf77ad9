//! Fitting what an expert computes to what it should compute: ridge regression of one matrix, and descent of any loss.

use moe_merge_kernels::dense::{Dense, Into, matmul};
use rayon::prelude::*;

use crate::error::RouterError;
use crate::lbfgs::{Lbfgs, Stop};
use crate::symmetric::Symmetric;

/// Rows of the change of a matrix that are summed together.
const ROWS: usize = 64;

/// A correction of a linear layer, from its inputs and from what its outputs lack:
///
/// ```text
/// D = argmin_D Σ_t ‖D a_t − r_t‖² + μ ‖D‖²,   μ = penalty · mean_i Σ_t a_ti²
/// ```
///
/// The penalty pulls towards the layer as it is. Tokens come in blocks of any size; f32 products, f64 sums over blocks in their
/// order: the same for any number of threads.
///
/// # Source
/// Hoerl and Kennard 1970, "Ridge regression: biased estimation for nonorthogonal problems".
#[derive(Debug, Clone)]
pub struct Correction {
    gram: Symmetric,
    /// `Σ_t r_t a_tᵀ`, `[out, in]`.
    cross: Vec<f64>,
    out: usize,
    lacking: f64,
}

impl Correction {
    /// Of a layer `[out, inputs]`; no token yet.
    pub fn new(inputs: usize, out: usize) -> Self {
        Self { gram: Symmetric::zeros(inputs), cross: vec![0.0; inputs * out], out, lacking: 0.0 }
    }

    /// More tokens: `inputs [n, inputs]`, and what is lacking of each one's output, `lacking [n, out]`.
    ///
    /// # Errors
    /// [`RouterError::Shape`] if they do not fit each other; [`RouterError::NotFinite`].
    pub fn add(&mut self, inputs: &[f32], lacking: &[f32]) -> Result<(), RouterError> {
        let (width, out) = (self.gram.width, self.out);
        let n = inputs.len().checked_div(width).unwrap_or(0);
        let (a, r) = (Dense::new(inputs, n, width)?, Dense::new(lacking, n, out)?);
        for (values, width) in [(inputs, width), (lacking, out)] {
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(RouterError::NotFinite { expert: 0, prompt: 0, token: at / width });
            }
        }
        self.gram.add_gram(inputs)?;
        self.cross.par_chunks_mut((ROWS * width).max(1)).enumerate().try_for_each(|(i, sum)| {
            let mut product = vec![0f32; sum.len()];
            let rows = i * ROWS..out.min((i + 1) * ROWS);
            matmul(r.columns(rows)?.transposed(), a, &mut product, Into::Overwrite)?;
            sum.iter_mut().zip(&product).for_each(|(s, p)| *s += f64::from(*p));
            Ok::<_, RouterError>(())
        })?;
        self.lacking += lacking.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
        Ok(())
    }

    /// Everything seen so far counts `factor` times.
    pub fn scale(&mut self, factor: f64) {
        self.gram.scale(factor);
        self.cross.iter_mut().for_each(|c| *c *= factor);
        self.lacking *= factor;
    }

    /// Mean over the inputs of the sum of their squares.
    pub fn mean_square(&self) -> f64 {
        self.gram.trace() / self.gram.width.max(1) as f64
    }

    /// Pulls towards the weights `towards` `[out, inputs]`, each input's as strongly as if it had been seen alone with the sum of
    /// squares `strength` `[inputs]`.
    ///
    /// # Errors
    /// [`RouterError::Shape`] if they do not fit the layer.
    pub fn pull(&mut self, strength: &[f64], towards: &[f32]) -> Result<(), RouterError> {
        let width = self.gram.width;
        let shape = |what, expected, found| match expected == found {
            true => Ok(()),
            false => Err(RouterError::Shape { what, expected, found }),
        };
        shape("strengths", width, strength.len())?;
        shape("weights", width * self.out, towards.len())?;
        self.gram.add_diagonal(strength);
        let rows =
            self.cross.chunks_exact_mut(width.max(1)).zip(towards.chunks_exact(width.max(1)));
        for (cross, towards) in rows {
            let pulled = cross.iter_mut().zip(strength).zip(towards);
            pulled.for_each(|((c, s), w)| *c += s * f64::from(*w));
        }
        Ok(())
    }

    /// Sum of squares of what was lacking.
    pub fn lacking(&self) -> f64 {
        self.lacking
    }

    /// The change of the layer, `[out, inputs]`.
    ///
    /// # Errors
    /// [`RouterError::AllZero`] if there was no input to learn from.
    pub fn solve(mut self, penalty: f64) -> Result<Vec<f64>, RouterError> {
        let mean = self.mean_square();
        if mean <= 0.0 {
            return Err(RouterError::AllZero);
        }
        self.gram.add_to_diagonal(penalty * mean);
        self.gram.cholesky()?.solve(&self.cross)
    }
}

/// A loss and its gradient at a point.
pub type Loss<'a, E> = dyn FnMut(&[f32]) -> Result<(f64, Vec<f64>), E> + 'a;

/// The end of a descent.
#[derive(Debug, Clone, PartialEq)]
pub struct Descent {
    /// The best point.
    pub point: Vec<f32>,
    /// Loss at the start and at that point.
    pub loss: [f64; 2],
    /// Steps taken.
    pub steps: usize,
}

/// Follows a loss downhill from `start` by L-BFGS.
///
/// * `evaluate`: loss and gradient at a point; its first step changes the point by a hundredth of its length
/// * memory: the point 8 bytes a number, 13 to 29 times over
///
/// # Errors
/// Whatever `evaluate` returns.
pub fn descend<E>(
    start: &[f32],
    most_steps: usize,
    evaluate: &mut Loss<'_, E>,
) -> Result<Descent, E> {
    /// Length of the first step, as a share of the point's.
    const FIRST: f64 = 0.01;
    let length = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
    let narrow = |v: &[f64]| -> Vec<f32> { v.iter().map(|&v| v as f32).collect() };
    let wide: Vec<f64> = start.iter().map(|&v| f64::from(v)).collect();
    let (before, gradient) = evaluate(start)?;
    let slope = length(&gradient);
    let unchanged = Descent { point: start.to_vec(), loss: [before, before], steps: 0 };
    if slope == 0.0 || !slope.is_finite() || !before.is_finite() || most_steps == 0 {
        return Ok(unchanged);
    }
    let first = FIRST * length(&wide).max(f64::MIN_POSITIVE) / slope;
    let stop = Stop { gradient: 0.0, relative: 0.0, decrease: 1e-4, iterations: most_steps };
    let mut solver = Lbfgs::new(wide, first, stop);
    solver.feed(before, gradient);
    let mut best = (before, None);
    while !solver.done() {
        let point = narrow(solver.trial());
        let (value, gradient) = evaluate(&point)?;
        if value < best.0 {
            best = (value, Some(point));
        }
        solver.feed(value, gradient);
    }
    let steps = solver.iterations();
    Ok(match best {
        (after, Some(point)) => Descent { point, loss: [before, after], steps },
        (_, None) => unchanged,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_input_by_hand() {
        // a = 1, 1, 2; r = 1, 2, 3: sum a a = 6, sum r a = 9, so D = 9 / (6 + penalty 6).
        let solve = |penalty| {
            let mut c = Correction::new(1, 1);
            c.add(&[1.0, 1.0], &[1.0, 2.0]).unwrap();
            c.add(&[2.0], &[3.0]).unwrap();
            assert_eq!(c.lacking(), 14.0);
            c.solve(penalty).unwrap()[0]
        };
        assert!((solve(0.0) - 1.5).abs() < 1e-12 && (solve(0.5) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_pull_by_hand() {
        // Twice (a = 1, r = 4), and a pull towards 1 that counts as much as 6 such inputs: (2 * 4 + 6 * 1) / (2 + 6).
        let mut c = Correction::new(1, 1);
        c.add(&[1.0], &[4.0]).unwrap();
        c.scale(2.0);
        c.pull(&[6.0], &[1.0]).unwrap();
        assert_eq!(c.mean_square(), 8.0);
        assert!(c.pull(&[1.0, 1.0], &[1.0]).is_err());
        assert!((c.solve(0.0).unwrap()[0] - 14.0 / 8.0).abs() < 1e-12);
    }

    #[test]
    fn a_known_change_is_found_again() {
        let (inputs, out, n) = (150, 70, 400);
        let number =
            |i: usize, seed: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0;
        let a: Vec<f32> = (0..n * inputs).map(|i| number(i * i % 65_537, 1)).collect();
        let change: Vec<f32> = (0..out * inputs).map(|i| number(i, 2)).collect();
        let mut r = vec![0f32; n * out];
        let view = Dense::new(&change, out, inputs).unwrap().transposed();
        matmul(Dense::new(&a, n, inputs).unwrap(), view, &mut r, Into::Overwrite).unwrap();
        let mut c = Correction::new(inputs, out);
        for (a, r) in a.chunks(100 * inputs).zip(r.chunks(100 * out)) {
            c.add(a, r).unwrap();
        }
        let found = c.solve(1e-9).unwrap();
        let off = found.iter().zip(&change).map(|(f, c)| (f - f64::from(*c)).abs());
        assert!(off.fold(0.0, f64::max) < 1e-3);
    }

    #[test]
    fn bad_numbers_are_refused() {
        let mut c = Correction::new(2, 1);
        assert!(matches!(c.add(&[1.0], &[1.0]), Err(RouterError::Shape { .. })));
        let nan = c.add(&[1.0, 0.0, f32::NAN, 0.0], &[1.0, 1.0]);
        assert_eq!(nan, Err(RouterError::NotFinite { expert: 0, prompt: 0, token: 1 }));
        assert_eq!(Correction::new(2, 1).solve(1.0), Err(RouterError::AllZero));
    }

    #[test]
    fn descends_a_bowl_and_stays_at_its_bottom() {
        let mut bowl = |x: &[f32]| -> Result<(f64, Vec<f64>), ()> {
            let off = [f64::from(x[0]) - 3.0, 10.0 * (f64::from(x[1]) + 1.0)];
            Ok((off[0] * off[0] + off[1] * off[1], vec![2.0 * off[0], 20.0 * off[1]]))
        };
        let found = descend(&[1.0, 1.0], 50, &mut bowl).unwrap();
        assert!(found.loss[1] < 1e-3 * found.loss[0] && (found.point[0] - 3.0).abs() < 0.1);
        let again = descend(&[3.0, -1.0], 50, &mut bowl).unwrap();
        assert_eq!((again.point, again.steps), (vec![3.0, -1.0], 0));
    }
}

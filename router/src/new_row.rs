//! One row of a gate that is fitted to text while all others stay as they are.

use rayon::prelude::*;

use crate::error::RouterError;
use crate::lbfgs::{Lbfgs, Stop};

/// What one token says about the row.
#[derive(Debug, Clone, Copy)]
pub struct RowSamples<'a> {
    /// `[tokens, hidden]`: what the router sees.
    pub inputs: &'a [f32],
    /// `[tokens]`: `ln Σ exp(logit)` over the other experts.
    pub others: &'a [f32],
    /// `[tokens]`: whether the text is the expert's own.
    pub own: &'a [bool],
}

/// Pull towards the start, in units of the mean square of the inputs: enough for a few prompts not to be learned by heart.
const PENALTY: f64 = 1e-3;

/// Where solving ends.
const STOP: Stop = Stop { gradient: 1e-7, relative: 1e-9, decrease: 1e-9, iterations: 200 };

/// Tokens that are added up in one go: sums have one order, whatever the number of threads.
const BLOCK: usize = 256;

/// The row of a gate that tells one expert's text from that of all others.
///
/// `row = argmin mean_own ln(1 + exp(o - w·x)) + mean_rest ln(1 + exp(w·x - o)) + λ/2 |w - start|²`, with `o` the log of the
/// sum of the other experts' exponentials, and `λ = 0.001 mean|x|²`: binary logistic regression with an offset, both
/// kinds of text weighing the same. The softmax over all rows then gives the expert the probability that this one fits.
///
/// * `start`: `[hidden]`, where nothing is known
/// * returns `[hidden]`
///
/// # Errors
/// [`RouterError::NoTokens`] if there is no text of the expert or of others, [`RouterError::Shape`] for slices of other
/// lengths.
///
/// # Source
/// Our own.
pub fn fit_row(samples: RowSamples<'_>, start: &[f32]) -> Result<Vec<f32>, RouterError> {
    let RowSamples { inputs, others, own } = samples;
    let hidden = start.len();
    let tokens = own.len();
    if inputs.len() != tokens * hidden || others.len() != tokens {
        return Err(RouterError::Shape {
            what: "inputs of a row",
            expected: tokens * hidden,
            found: inputs.len(),
        });
    }
    let ours = own.iter().filter(|o| **o).count();
    if ours == 0 || ours == tokens {
        return Err(RouterError::NoTokens { expert: usize::from(ours == 0) });
    }
    let square: f64 = inputs.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let mean = square / tokens as f64;
    let penalty = PENALTY * mean.max(f64::MIN_POSITIVE);
    let start: Vec<f64> = start.iter().map(|v| f64::from(*v)).collect();
    // The curvature of the loss is at most a quarter of the mean square, once for either kind of text.
    let mut solver = Lbfgs::new(start.clone(), 2.0 / mean.max(f64::MIN_POSITIVE), STOP);
    let weights = [1.0 / (tokens - ours) as f64, 1.0 / ours as f64];
    while !solver.done() {
        let point = solver.trial();
        let (mut value, mut gradient) = loss(samples, weights, point);
        for ((g, w), s) in gradient.iter_mut().zip(point).zip(&start) {
            value += 0.5 * penalty * (w - s) * (w - s);
            *g += penalty * (w - s);
        }
        solver.feed(value, gradient);
    }
    Ok(solver.point().iter().map(|v| *v as f32).collect())
}

/// Value and gradient of the loss without its penalty; `weights` of a token that is not the expert's own, and of one that is.
fn loss(samples: RowSamples<'_>, weights: [f64; 2], point: &[f64]) -> (f64, Vec<f64>) {
    let hidden = point.len();
    let blocks: Vec<(f64, Vec<f64>)> = samples
        .inputs
        .par_chunks(BLOCK * hidden)
        .enumerate()
        .map(|(block, inputs)| {
            let (mut value, mut gradient) = (0.0, vec![0.0; hidden]);
            for (i, x) in inputs.chunks_exact(hidden).enumerate() {
                let token = block * BLOCK + i;
                let own = samples.own[token];
                let logit: f64 = x.iter().zip(point).map(|(x, w)| f64::from(*x) * w).sum();
                let margin = logit - f64::from(samples.others[token]);
                let against = if own { -margin } else { margin };
                let weight = weights[usize::from(own)];
                // ln(1 + exp(a)) without overflow.
                value += weight * (against.max(0.0) + (-against.abs()).exp().ln_1p());
                let share = 1.0 / (1.0 + (-against).exp());
                let slope = weight * if own { -share } else { share };
                gradient.iter_mut().zip(x).for_each(|(g, x)| *g += slope * f64::from(*x));
            }
            (value, gradient)
        })
        .collect();
    let mut all = (0.0, vec![0.0; hidden]);
    for (value, gradient) in blocks {
        all.0 += value;
        all.1.iter_mut().zip(gradient).for_each(|(a, g)| *a += g);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The gradient is that of the value.
    #[test]
    fn slopes_by_finite_differences() {
        let inputs: Vec<f32> = (0..15).map(|i| (i as f32 * 1.7).sin()).collect();
        let others: Vec<f32> = (0..5).map(|i| (i as f32 * 0.9).cos()).collect();
        let own = [true, false, true, false, false];
        let samples = RowSamples { inputs: &inputs, others: &others, own: &own };
        let point = [0.3, -0.2, 0.5];
        let (_, gradient) = loss(samples, [0.4, 0.6], &point);
        for at in 0..3 {
            let moved = |by: f64| {
                let mut point = point;
                point[at] += by;
                loss(samples, [0.4, 0.6], &point).0
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((slope - gradient[at]).abs() < 1e-8, "{slope} {}", gradient[at]);
        }
    }

    #[test]
    fn own_text_goes_to_the_row_and_other_text_does_not() {
        // Own text along the second axis, other text along the first, whose expert has the row (2, 0).
        let (mut inputs, mut others, mut own) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..600 {
            let noise = (i as f32 * 0.37).sin() * 0.2;
            let ours = i % 3 == 0;
            let x = if ours { [noise, 1.0] } else { [1.0, noise] };
            inputs.extend(x);
            others.push(2.0 * x[0]);
            own.push(ours);
        }
        let samples = RowSamples { inputs: &inputs, others: &others, own: &own };
        let row = fit_row(samples, &[1.0, 0.0]).unwrap();
        for (i, x) in inputs.chunks_exact(2).enumerate() {
            let wins = x[0] * row[0] + x[1] * row[1] > others[i];
            assert_eq!(wins, own[i], "{row:?} {x:?}");
        }
    }

    #[test]
    fn text_of_one_kind_is_refused() {
        let fit = |own: &[bool], inputs: &[f32]| {
            fit_row(RowSamples { inputs, others: &[0.0, 0.0], own }, &[0.0])
        };
        assert!(fit(&[true, true], &[1.0, 2.0]).is_err());
        assert!(fit(&[false, false], &[1.0, 2.0]).is_err());
        assert!(fit(&[true, false], &[1.0]).is_err());
        assert!(fit(&[true, false], &[1.0, -1.0]).is_ok());
    }
}

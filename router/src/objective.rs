//! The loss of multinomial logistic regression, for several fits at once.

use moe_merge_kernels::dense::{Dense, Into, Real, matmul};
use rayon::prelude::*;

use crate::error::RouterError;
use crate::samples::{Sign, Target};

/// Rows that one product takes at a time: scores and residuals of a block stay in cache.
const BLOCK: usize = 128;
/// Most parts the rows are split into. Fixed, so that sums are the same whatever the thread count.
const PARTS: usize = 8;

/// Labelled features.
pub(crate) struct Data<'a, T> {
    pub experts: usize,
    /// Columns of `x`.
    pub width: usize,
    /// `[n, width]`.
    pub x: &'a [T],
    /// `[n]`.
    pub targets: &'a [Target],
}

/// One fit: its parameters `[experts, width]` and the weight of each row `[n]`.
pub(crate) struct Problem<'a> {
    pub w: &'a [f64],
    pub weights: &'a [f64],
}

impl<T: Real> Data<'_, T> {
    /// Value and gradient `[experts, width]` of each problem:
    ///
    /// `Σ_i weight_i · loss_i + penalty · ‖w‖²`, with `loss = -ln p_y`, or `-ln (1 - p_y)` for a negative row, and
    /// `p = softmax(w · x_i)`. Products in `T`, the rest in f64.
    pub fn evaluate(
        &self,
        problems: &[Problem<'_>],
        penalty: f64,
    ) -> Result<Vec<(f64, Vec<f64>)>, RouterError> {
        let (n, size) = (self.targets.len(), self.experts * self.width);
        let w: Vec<T> = problems.iter().flat_map(|p| p.w.iter().map(|&v| T::from_f64(v))).collect();
        let per_part = n.div_ceil(BLOCK).div_ceil(PARTS).max(1) * BLOCK;
        let parts: Vec<_> = (0..n.div_ceil(per_part))
            .into_par_iter()
            .map(|i| self.part(problems, &w, i * per_part, n.min((i + 1) * per_part)))
            .collect::<Result<_, _>>()?;
        Ok(problems
            .iter()
            .enumerate()
            .map(|(p, problem)| {
                let mut value = penalty * problem.w.iter().map(|v| v * v).sum::<f64>();
                let mut gradient: Vec<f64> = problem.w.iter().map(|v| 2.0 * penalty * v).collect();
                for (losses, gradients) in &parts {
                    value += losses[p];
                    for (g, v) in gradient.iter_mut().zip(&gradients[p * size..(p + 1) * size]) {
                        *g += v.to_f64();
                    }
                }
                (value, gradient)
            })
            .collect())
    }

    /// Losses `[problems]` and gradients `[problems, experts, width]` of rows `from..to`.
    fn part(
        &self,
        problems: &[Problem<'_>],
        w: &[T],
        from: usize,
        to: usize,
    ) -> Result<(Vec<f64>, Vec<T>), RouterError> {
        let (experts, width, columns) = (self.experts, self.width, problems.len() * self.experts);
        let mut losses = vec![0.0; problems.len()];
        let mut gradients = vec![T::ZERO; columns * width];
        let mut scores = vec![T::ZERO; BLOCK * columns]; // [block, problems, experts], then the residuals
        let mut row = vec![0.0; experts];
        let w = Dense::new(w, columns, width)?;
        for start in (from..to).step_by(BLOCK) {
            let end = to.min(start + BLOCK);
            let scores = &mut scores[..(end - start) * columns];
            let x = Dense::new(&self.x[start * width..end * width], end - start, width)?;
            matmul(x, w.transposed(), scores, Into::Overwrite)?;
            for (i, scores) in (start..end).zip(scores.chunks_exact_mut(columns)) {
                for (p, scores) in scores.chunks_exact_mut(experts).enumerate() {
                    let weight = problems[p].weights[i];
                    if weight == 0.0 {
                        scores.fill(T::ZERO);
                        continue;
                    }
                    row.iter_mut().zip(scores.iter()).for_each(|(r, s)| *r = s.to_f64());
                    losses[p] += weight * loss(&mut row, self.targets[i]);
                    scores.iter_mut().zip(&row).for_each(|(s, r)| *s = T::from_f64(weight * r));
                }
            }
            let residuals = Dense::new(scores, end - start, columns)?;
            matmul(residuals.transposed(), x, &mut gradients, Into::Add)?;
        }
        Ok((losses, gradients))
    }
}

/// Loss of one row of logits, which are replaced by their gradient.
///
/// Positive: `lse(s) - s_y`, gradient `p - onehot(y)`. Negative: `lse(s) - lse(s without y)`, gradient `p - q` with `q`
/// the softmax over the others.
pub(crate) fn loss(logits: &mut [f64], target: Target) -> f64 {
    let y = target.expert;
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let own = logits[y];
    if target.sign == Sign::Positive {
        logits.iter_mut().for_each(|v| *v = (*v - top).exp());
        let sum: f64 = logits.iter().sum();
        logits.iter_mut().for_each(|v| *v /= sum);
        logits[y] -= 1.0;
        return top + sum.ln() - own;
    }
    let others = || logits.iter().enumerate().filter(|&(j, _)| j != y).map(|(_, &v)| v);
    let top_others = others().fold(f64::NEG_INFINITY, f64::max);
    let sum_others: f64 = others().map(|v| (v - top_others).exp()).sum();
    // In units of the others' sum, so that nothing cancels when y dominates.
    let lse_others = top_others + sum_others.ln();
    let (excess, p_own);
    if own > lse_others {
        let ratio = (lse_others - own).exp();
        excess = own - lse_others + ratio.ln_1p();
        p_own = 1.0 / (1.0 + ratio);
    } else {
        let ratio = (own - lse_others).exp();
        excess = ratio.ln_1p();
        p_own = ratio / (1.0 + ratio);
    }
    for (j, v) in logits.iter_mut().enumerate() {
        // p_j - q_j = q_j (1 - p_y) - q_j
        *v = if j == y { p_own } else { -p_own * (*v - lse_others).exp() };
    }
    excess
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(expert: usize, sign: Sign) -> Target {
        Target { expert, sign }
    }

    #[test]
    fn losses_by_hand() {
        // p = (1/2, 1/4, 1/4)
        let logits = [2f64.ln(), 0.0, 0.0];
        let mut s = logits;
        assert!((loss(&mut s, target(0, Sign::Positive)) - 2f64.ln()).abs() < 1e-15);
        assert!(s.iter().zip([-0.5, 0.25, 0.25]).all(|(a, b)| (a - b).abs() < 1e-15));
        let mut s = logits;
        // -ln (1 - 1/4); q = (2/3, 0, 1/3)
        assert!((loss(&mut s, target(1, Sign::Negative)) - (4f64 / 3.0).ln()).abs() < 1e-15);
        let expected = [0.5 - 2.0 / 3.0, 0.25, 0.25 - 1.0 / 3.0];
        assert!(s.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-15));
    }

    #[test]
    fn extreme_logits_stay_finite() {
        for sign in [Sign::Positive, Sign::Negative] {
            for logits in [[900.0, -900.0], [-900.0, 900.0]] {
                let mut s = logits;
                let value = loss(&mut s, target(0, sign));
                assert!(value.is_finite() && value >= 0.0);
                assert!(s.iter().all(|v| v.is_finite()));
            }
        }
    }

    #[test]
    fn gradient_against_finite_differences() {
        let (n, width, experts) = (300, 5, 3);
        let value = |i: usize, m: usize| ((i * 7919 % m) as f64 / m as f64) - 0.5;
        let x: Vec<f64> = (0..n * width).map(|i| value(i, 1013)).collect();
        let targets: Vec<Target> = (0..n)
            .map(|i| target(i % 3, if i % 5 == 0 { Sign::Negative } else { Sign::Positive }))
            .collect();
        let data = Data { experts, width, x: &x, targets: &targets };
        let weights: Vec<Vec<f64>> =
            (0..2).map(|p| (0..n).map(|i| ((i + p) % 4) as f64 / n as f64).collect()).collect();
        let ws: Vec<Vec<f64>> = (0..2)
            .map(|p| (0..experts * width).map(|i| 3.0 * value(i + p, 31)).collect())
            .collect();
        let at = |ws: &[Vec<f64>]| {
            let problems: Vec<_> =
                ws.iter().zip(&weights).map(|(w, weights)| Problem { w, weights }).collect();
            data.evaluate(&problems, 0.02).unwrap()
        };
        let found = at(&ws);
        for p in 0..2 {
            for k in 0..experts * width {
                let h = 1e-5;
                let (mut up, mut down) = (ws.clone(), ws.clone());
                up[p][k] += h;
                down[p][k] -= h;
                let difference = (at(&up)[p].0 - at(&down)[p].0) / (2.0 * h);
                assert!(
                    (difference - found[p].1[k]).abs() < 1e-9,
                    "{difference} {}",
                    found[p].1[k]
                );
            }
        }
    }
}

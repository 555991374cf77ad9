//! Output matching: the layer's output made right, instead of its choice.

use moe_merge_kernels::dense::{Dense, Into, matmul};
use rayon::prelude::*;

use crate::error::RouterError;
use crate::estimators::logistic::LOGIT_BOUND;
use crate::gate::Gate;
use crate::lbfgs::{Lbfgs, Stop};

/// Tokens of one layer with what every expert makes of them.
#[derive(Debug, Clone, Copy)]
pub struct Comparison<'a> {
    /// Experts the gate chooses among.
    pub experts: usize,
    /// Width of the router input.
    pub hidden: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Router inputs, `[tokens, hidden]`.
    pub inputs: &'a [f32],
    /// `[tokens, experts, experts]`: inner products of the experts' outputs about their mean.
    pub outputs: &'a [f32],
    /// What is wanted of each token, `[tokens]`.
    pub tokens: &'a [Wanted],
    /// A token whose routing is known.
    pub anchor: Option<Anchor<'a>>,
}

/// What is wanted of a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wanted {
    /// The expert whose text it is of; for `against`, the one it should not go to.
    pub expert: usize,
    /// Whether it is of a negative prompt.
    pub against: bool,
    /// How much it counts; 0 leaves it out.
    pub weight: f64,
}

/// A token whose routing is known: the one that every text begins with.
#[derive(Debug, Clone, Copy)]
pub struct Anchor<'a> {
    /// Its router input, `[hidden]`.
    pub input: &'a [f32],
    /// How much of it each expert should get, `[experts]`, sum 1.
    pub weights: &'a [f32],
}

/// How outputs are matched. [`MatchOptions::default`] is what measured best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatchOptions {
    /// L2 penalty; inputs have unit RMS and all weights sum to one.
    pub penalty: f64,
    /// Weight of the classification loss beside the error of the output.
    pub cross_entropy: f64,
    /// Weight of the anchor: squared error of its logits.
    pub anchor: f64,
    /// Most iterations.
    pub max_iterations: usize,
}

impl Default for MatchOptions {
    fn default() -> Self {
        Self { penalty: 5e-4, cross_entropy: 0.1, anchor: 0.1, max_iterations: 150 }
    }
}

/// A gate from output matching.
#[derive(Debug, Clone, PartialEq)]
pub struct Matched {
    /// The gate; its rows sum to zero.
    pub gate: Gate,
    /// Squared error of the layer's output, over that of an expert chosen at random: of the starting gate, and of this.
    pub error: [f64; 2],
    /// Iterations.
    pub iterations: usize,
}

/// Rows whose loss is computed together.
const BLOCK: usize = 256;

/// Logits of an anchor's experts without weight lie as far below the others as if they had this share.
const LEAST_SHARE: f64 = 0.01;

/// The gate that makes the layer's output most like that of the right experts, found by L-BFGS from `start`:
///
/// ```text
/// W = argmin Σ_t w_t (‖Σ_{e in top-k} p_e O_e(z_t) − O_{y_t}(z_t)‖² / S − c ln softmax(W x_t)[y_t])
///            + penalty ‖W‖² + a ‖W x_a − ln q‖²
/// ```
///
/// * `x = z / rms(z)`; `p`: softmax over the `top_k` highest logits; `S`: mean squared difference of another expert's output
///   from the right one's
/// * a token of a negative prompt has no right output: it counts with `−ln (1 − softmax(W x)[y])` alone
/// * the anchor's logits count about their mean; `q`: its weights, those below 1 % as 1 %
/// * rows sum to zero, and no logit of a given token exceeds [`LOGIT_BOUND`]
/// * needs no backward pass through the model; f64 sums in a fixed order: the same for any number of threads
///
/// # Errors
/// Sizes that do not go together, numbers that are not finite, no token that counts.
///
/// # Source
/// Our own.
pub fn fit(
    comparison: &Comparison<'_>,
    start: &Gate,
    options: &MatchOptions,
) -> Result<Matched, RouterError> {
    check(comparison, start)?;
    let problem = Problem::new(comparison, options)?;
    let at: Vec<f64> = start.rows.iter().map(|&w| f64::from(w) * problem.rms).collect();
    let before = problem.evaluate(&at)?.error;
    let stop = Stop {
        gradient: 1e-10,
        relative: 1e-4 * options.penalty,
        decrease: 1e-6,
        iterations: options.max_iterations,
    };
    let mut solver = Lbfgs::new(at, 2.0 / comparison.hidden as f64, stop);
    while !solver.done() {
        let value = problem.evaluate(solver.trial())?;
        solver.feed(value.value, value.gradient);
    }
    let mut rows = solver.point().to_vec();
    let after = problem.evaluate(&rows)?.error;
    problem.finish(&mut rows);
    Ok(Matched {
        gate: Gate::from_f64(comparison.experts, comparison.hidden, &rows),
        error: [before, after],
        iterations: solver.iterations(),
    })
}

fn check(c: &Comparison<'_>, start: &Gate) -> Result<(), RouterError> {
    let (experts, hidden, tokens) = (c.experts, c.hidden, c.tokens.len());
    if experts < 2 {
        return Err(RouterError::TooFewExperts { experts });
    }
    let sizes = [
        ("router inputs", tokens * hidden, c.inputs.len()),
        ("inner products of outputs", tokens * experts * experts, c.outputs.len()),
        ("the starting gate", experts * hidden, start.rows.len()),
        ("an anchor's input", hidden, c.anchor.map_or(hidden, |a| a.input.len())),
        ("an anchor's weights", experts, c.anchor.map_or(experts, |a| a.weights.len())),
    ];
    for (what, expected, found) in sizes {
        if expected != found {
            return Err(RouterError::Shape { what, expected, found });
        }
    }
    if let Some(wrong) = c.tokens.iter().find(|t| t.expert >= experts) {
        return Err(RouterError::NoSuchExpert { expert: wrong.expert, experts });
    }
    for (values, width) in [(c.inputs, hidden), (c.outputs, experts * experts)] {
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let expert = c.tokens[at / width].expert;
            return Err(RouterError::NotFinite { expert, prompt: 0, token: at / width });
        }
    }
    Ok(())
}

struct Problem<'a> {
    given: &'a Comparison<'a>,
    /// `[tokens, hidden]`, divided by `rms`.
    x: Vec<f32>,
    rms: f64,
    /// Weights over their sum, `[tokens]`.
    weights: Vec<f64>,
    /// One over the mean squared difference of another expert's output.
    per_error: f64,
    /// Input and logits of the anchor.
    anchor: Option<(Vec<f64>, Vec<f64>)>,
    options: MatchOptions,
}

#[derive(Clone)]
struct Value {
    value: f64,
    /// The output's part of the value.
    error: f64,
    gradient: Vec<f64>,
}

impl<'a> Problem<'a> {
    fn new(given: &'a Comparison<'a>, options: &MatchOptions) -> Result<Self, RouterError> {
        let (e, n) = (given.experts, given.tokens.len());
        let total: f64 = given.tokens.iter().map(|t| t.weight).sum();
        if !(total.is_finite() && total > 0.0) {
            return Err(RouterError::NoTokens { expert: 0 });
        }
        let weights: Vec<f64> = given.tokens.iter().map(|t| t.weight / total).collect();
        let squares: f64 = given.inputs.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let rms = (squares / given.inputs.len() as f64).sqrt();
        if rms == 0.0 {
            return Err(RouterError::AllZero);
        }
        let mut spread = 0.0;
        for t in (0..n).filter(|&t| !given.tokens[t].against) {
            let products = &given.outputs[t * e * e..][..e * e];
            let y = given.tokens[t].expert;
            let apart = |a: usize| {
                let at = |i: usize, j: usize| f64::from(products[i * e + j]);
                at(a, a) - 2.0 * at(a, y) + at(y, y)
            };
            spread += weights[t] * (0..e).map(apart).sum::<f64>() / (e - 1) as f64;
        }
        let anchor = given.anchor.map(|a| {
            let input: Vec<f64> = a.input.iter().map(|&v| f64::from(v) / rms).collect();
            let logits = a.weights.iter().map(|&w| f64::from(w).max(LEAST_SHARE).ln());
            let mut logits: Vec<f64> = logits.collect();
            centre(&mut logits);
            (input, logits)
        });
        Ok(Self {
            x: given.inputs.iter().map(|&v| (f64::from(v) / rms) as f32).collect(),
            rms,
            weights,
            // Experts that do the same need no choice: the classification loss alone is left.
            per_error: if spread > 0.0 { 1.0 / spread } else { 0.0 },
            anchor,
            options: *options,
            given,
        })
    }

    fn evaluate(&self, w: &[f64]) -> Result<Value, RouterError> {
        let (e, h, n) = (self.given.experts, self.given.hidden, self.given.tokens.len());
        let narrow: Vec<f32> = w.iter().map(|&v| v as f32).collect();
        let parts: Vec<Value> = (0..n.div_ceil(BLOCK))
            .into_par_iter()
            .map(|i| self.block(&narrow, i * BLOCK, n.min((i + 1) * BLOCK)))
            .collect::<Result<_, _>>()?;
        let penalty = self.options.penalty;
        let mut all = Value {
            value: penalty * w.iter().map(|v| v * v).sum::<f64>(),
            error: 0.0,
            gradient: w.iter().map(|v| 2.0 * penalty * v).collect(),
        };
        for part in &parts {
            all.value += part.value;
            all.error += part.error;
            all.gradient.iter_mut().zip(&part.gradient).for_each(|(a, b)| *a += b);
        }
        if let Some((input, wanted)) = &self.anchor {
            let mut off: Vec<f64> = (0..e)
                .map(|k| w[k * h..(k + 1) * h].iter().zip(input).map(|(a, b)| a * b).sum())
                .collect();
            centre(&mut off);
            off.iter_mut().zip(wanted).for_each(|(o, t)| *o -= t);
            all.value += self.options.anchor * off.iter().map(|o| o * o).sum::<f64>();
            for (k, off) in off.iter().enumerate() {
                let factor = 2.0 * self.options.anchor * off;
                let row = &mut all.gradient[k * h..(k + 1) * h];
                row.iter_mut().zip(input).for_each(|(g, x)| *g += factor * x);
            }
        }
        Ok(all)
    }

    fn block(&self, w: &[f32], from: usize, to: usize) -> Result<Value, RouterError> {
        let (e, h) = (self.given.experts, self.given.hidden);
        let x = Dense::new(&self.x[from * h..to * h], to - from, h)?;
        let mut scores = vec![0f32; (to - from) * e];
        matmul(x, Dense::new(w, e, h)?.transposed(), &mut scores, Into::Overwrite)?;
        let (mut value, mut error) = (0.0, 0.0);
        let mut work = Work::new(e);
        for (t, scores) in (from..to).zip(scores.chunks_exact_mut(e)) {
            let weight = self.weights[t];
            if weight == 0.0 {
                scores.fill(0.0);
                continue;
            }
            let wanted = &self.given.tokens[t];
            work.logits.iter_mut().zip(scores.iter()).for_each(|(l, s)| *l = f64::from(*s));
            let mut off = 0.0;
            if wanted.against {
                work.gradient.fill(0.0);
            } else {
                let products = &self.given.outputs[t * e * e..][..e * e];
                off = self.per_error * work.output_error(products, wanted.expert, self.given.top_k);
                work.gradient.iter_mut().for_each(|g| *g *= self.per_error);
            }
            let loss = work.classification(wanted, self.options.cross_entropy);
            value += weight * (off + loss);
            error += weight * off;
            let pairs = scores.iter_mut().zip(&work.gradient);
            pairs.for_each(|(s, g)| *s = (weight * g) as f32);
        }
        let mut gradient = vec![0f32; e * h];
        matmul(Dense::new(&scores, to - from, e)?.transposed(), x, &mut gradient, Into::Overwrite)?;
        Ok(Value { value, error, gradient: gradient.into_iter().map(f64::from).collect() })
    }

    /// Rows in the units of the router input, summing to zero, with bounded logits.
    fn finish(&self, rows: &mut [f64]) {
        let (e, h) = (self.given.experts, self.given.hidden);
        for k in 0..h {
            let mean = (0..e).map(|i| rows[i * h + k]).sum::<f64>() / e as f64;
            (0..e).for_each(|i| rows[i * h + k] -= mean);
        }
        let largest = self
            .x
            .par_chunks_exact(h)
            .map(|x| {
                let logit = |row: &[f64]| -> f64 {
                    row.iter().zip(x).map(|(w, &x)| w * f64::from(x)).sum()
                };
                rows.chunks_exact(h).map(|row| logit(row).abs()).fold(0.0, f64::max)
            })
            .reduce(|| 0.0, f64::max);
        let factor = if largest > LOGIT_BOUND { LOGIT_BOUND / largest } else { 1.0 };
        rows.iter_mut().for_each(|w| *w *= factor / self.rms);
    }
}

/// What one token needs, kept between tokens.
struct Work {
    logits: Vec<f64>,
    /// Of the loss by the logits.
    gradient: Vec<f64>,
    order: Vec<usize>,
    p: Vec<f64>,
    slope: Vec<f64>,
}

impl Work {
    fn new(experts: usize) -> Self {
        Self {
            logits: vec![0.0; experts],
            gradient: vec![0.0; experts],
            order: (0..experts).collect(),
            p: vec![0.0; experts],
            slope: vec![0.0; experts],
        }
    }

    /// `‖Σ p_e O_e − O_y‖²`, its gradient by the logits in `gradient`.
    fn output_error(&mut self, products: &[f32], y: usize, top_k: usize) -> f64 {
        let e = self.logits.len();
        let logits = &self.logits;
        self.order.sort_unstable_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let chosen = &self.order[..top_k.min(e)];
        let top = logits[chosen[0]];
        self.gradient.fill(0.0);
        self.p.fill(0.0);
        chosen.iter().for_each(|&i| self.p[i] = (logits[i] - top).exp());
        let sum: f64 = chosen.iter().map(|&i| self.p[i]).sum();
        chosen.iter().for_each(|&i| self.p[i] /= sum);
        let at = |i: usize, j: usize| f64::from(products[i * e + j]);
        // Products of differences from the right output: D = P_ij − P_iy − P_yj + P_yy.
        let mut error = 0.0;
        for &i in chosen {
            let slope: f64 = chosen
                .iter()
                .map(|&j| self.p[j] * (at(i, j) - at(i, y) - at(y, j) + at(y, y)))
                .sum();
            self.slope[i] = slope;
            error += self.p[i] * slope;
        }
        for &i in chosen {
            self.gradient[i] = 2.0 * self.p[i] * (self.slope[i] - error);
        }
        error
    }

    /// `factor ·` the classification loss, its gradient added to `gradient`.
    fn classification(&mut self, wanted: &Wanted, factor: f64) -> f64 {
        let target = wanted.target();
        let loss = crate::objective::loss(&mut self.logits, target);
        self.gradient.iter_mut().zip(&self.logits).for_each(|(g, l)| *g += factor * l);
        factor * loss
    }
}

impl Wanted {
    fn target(&self) -> crate::samples::Target {
        let sign = if self.against {
            crate::samples::Sign::Negative
        } else {
            crate::samples::Sign::Positive
        };
        crate::samples::Target { expert: self.expert, sign }
    }
}

fn centre(values: &mut [f64]) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    values.iter_mut().for_each(|v| *v -= mean);
}

#[cfg(test)]
mod tests;

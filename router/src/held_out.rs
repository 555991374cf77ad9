//! What a gate does with prompts it has not seen.

use crate::features::Features;
use crate::folds::Folds;
use crate::objective::loss;
use crate::samples::{Sign, Table, Target};

/// Quality on held-out prompts. Every expert weighs the same, whatever its number of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct HeldOut {
    /// Groups the prompts were split into; each fit lacked one.
    pub folds: usize,
    /// Experts per token that coverage and load are for.
    pub top_k: usize,
    /// Held-out tokens of each expert; zero for an expert whose only prompt is never held out.
    pub tokens: Vec<usize>, // [experts]
    /// Mean `-ln p` of the right expert over held-out tokens, in nats; knowing nothing is `ln experts`.
    pub nll: f64,
    /// Share of an expert's tokens that go to it first; none if it has no held-out token.
    pub accuracy: Vec<Option<f64>>, // [experts]
    /// Share of an expert's tokens whose `top_k` experts include it.
    pub coverage: Vec<Option<f64>>, // [experts]
    /// Share of expert `a`'s tokens that go to `b` first; rows sum to 1, or to 0 without held-out tokens.
    pub confusion: Vec<f64>, // [experts, experts]
    /// Share of all `top_k` places that each expert gets when every domain is as frequent; sums to 1.
    pub load: Vec<f64>, // [experts]
}

impl HeldOut {
    /// Mean accuracy of the experts that have one.
    pub fn mean_accuracy(&self) -> f64 {
        let known: Vec<f64> = self.accuracy.iter().flatten().copied().collect();
        known.iter().sum::<f64>() / known.len() as f64
    }
}

/// Logits of held-out rows, each from the fit that had not seen it.
pub(crate) struct Logits {
    experts: usize,
    targets: Vec<Target>,
    values: Vec<f64>,  // [rows, experts]
    weights: Vec<f64>, // [rows]
}

impl Logits {
    /// `parameters`: one `[experts, width]` per fold, for features `x: [n, width]`.
    pub fn new(
        table: &Table,
        folds: &Folds,
        x: &[f32],
        width: usize,
        parameters: &[&[f64]],
    ) -> Self {
        let experts = table.experts;
        let mut out =
            Self { experts, targets: Vec::new(), values: Vec::new(), weights: Vec::new() };
        let mut tokens = vec![[0usize; 2]; experts];
        let place = |sign: Sign| usize::from(sign == Sign::Negative);
        for (prompt, fold) in table.prompts.iter().zip(&folds.of_prompt) {
            let Some(fold) = *fold else { continue };
            let w = parameters[fold];
            for i in prompt.rows.clone() {
                let z = &x[i * width..(i + 1) * width];
                out.targets.push(prompt.target);
                out.values.extend(w.chunks_exact(width).map(|w| product(w, z)));
            }
            tokens[prompt.target.expert][place(prompt.target.sign)] += prompt.rows.len();
        }
        let known = tokens.iter().filter(|t| t[0] > 0).count();
        let weight = |t: &Target| 1.0 / (known * tokens[t.expert][place(t.sign)]) as f64;
        out.weights = out.targets.iter().map(weight).collect();
        out
    }

    /// Logits of every row from one fit: `parameters: [experts, width]`.
    pub fn of_all(table: &Table, features: &Features, parameters: &[f64]) -> Self {
        let prompts = table.prompts.len();
        let folds = Folds { count: 1, of_prompt: vec![Some(0); prompts] };
        Self::new(table, &folds, &features.x32, features.width, &[parameters])
    }

    /// Weighted RMS of the logits about the mean of their row; zero if the rows tell nothing apart.
    pub fn spread(&self) -> f64 {
        let (mut sum, mut total) = (0.0, 0.0);
        for (s, weight) in self.values.chunks_exact(self.experts).zip(&self.weights) {
            let mean = s.iter().sum::<f64>() / self.experts as f64;
            let square: f64 = s.iter().map(|v| (v - mean) * (v - mean)).sum();
            sum += weight * square / self.experts as f64;
            total += weight;
        }
        (sum / total).sqrt()
    }

    /// All logits times `factor`.
    pub fn scale(&mut self, factor: f64) {
        self.values.iter_mut().for_each(|v| *v *= factor);
    }

    /// Weighted loss at `temperature`, and its first two derivatives by it. Negative rows included.
    fn loss_at(&self, temperature: f64) -> [f64; 3] {
        let mut sums = [0.0; 3];
        let mut gradient = vec![0.0; self.experts];
        for ((s, &target), weight) in
            self.values.chunks_exact(self.experts).zip(&self.targets).zip(&self.weights)
        {
            gradient.iter_mut().zip(s).for_each(|(g, s)| *g = temperature * s);
            sums[0] += weight * loss(&mut gradient, target);
            let first: f64 = gradient.iter().zip(s).map(|(g, s)| g * s).sum();
            // Variance under p of the logits; for a negative row this leaves out the others' part, which only
            // shortens the Newton step.
            let y = target.expert;
            if target.sign == Sign::Positive {
                gradient[y] += 1.0;
            } else {
                gradient.iter_mut().for_each(|g| *g = g.abs() / 2.0);
            }
            let mean: f64 = gradient.iter().zip(s).map(|(p, s)| p * s).sum();
            let square: f64 = gradient.iter().zip(s).map(|(p, s)| p * s * s).sum();
            sums[1] += weight * first;
            sums[2] += weight * (square - mean * mean);
        }
        sums
    }

    /// The factor on the logits with the lowest loss, between 1/16 and 16, and that loss.
    pub fn best_temperature(&self) -> (f64, f64) {
        let (mut low, mut high) = (1.0 / 16.0, 16.0);
        let mut t: f64 = 1.0;
        let mut value = f64::INFINITY;
        for _ in 0..30 {
            let [at, slope, curvature] = self.loss_at(t);
            value = at;
            if slope > 0.0 {
                high = t
            } else {
                low = t
            }
            let newton = t - slope / curvature;
            let next = if newton > low && newton < high { newton } else { f64::sqrt(low * high) };
            if (next - t).abs() < 1e-3 * t {
                break;
            }
            t = next;
        }
        (t, value)
    }

    /// The figures at `temperature`.
    pub fn figures(&self, temperature: f64, folds: usize, top_k: usize) -> HeldOut {
        let experts = self.experts;
        let top_k = top_k.clamp(1, experts);
        let mut tokens = vec![0usize; experts];
        let mut confusion = vec![0.0; experts * experts];
        let (mut covered, mut load) = (vec![0.0; experts], vec![0.0; experts]);
        let mut nll = 0.0;
        let mut order: Vec<usize> = (0..experts).collect();
        let rows = self.values.chunks_exact(experts).zip(&self.targets).zip(&self.weights);
        for ((s, &target), weight) in rows {
            if target.sign == Sign::Negative {
                continue;
            }
            let own = target.expert;
            let mut scaled: Vec<f64> = s.iter().map(|v| v * temperature).collect();
            nll += weight * loss(&mut scaled, target);
            order.sort_by(|&a, &b| s[b].total_cmp(&s[a]).then(a.cmp(&b)));
            tokens[own] += 1;
            confusion[own * experts + order[0]] += 1.0;
            for &e in &order[..top_k] {
                load[e] += weight / top_k as f64;
                covered[own] += f64::from(u8::from(e == own));
            }
        }
        let share = |count: f64, e: usize| (tokens[e] > 0).then(|| count / tokens[e] as f64);
        let accuracy = (0..experts).map(|e| share(confusion[e * experts + e], e)).collect();
        let coverage = (0..experts).map(|e| share(covered[e], e)).collect();
        for (e, row) in confusion.chunks_exact_mut(experts).enumerate() {
            row.iter_mut().for_each(|c| *c /= tokens[e].max(1) as f64);
        }
        HeldOut { folds, top_k, tokens, nll, accuracy, coverage, confusion, load }
    }
}

/// Eight sums in f64: one alone would wait for each addition.
fn product(w: &[f64], z: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    let (mut cw, mut cz) = (w.chunks_exact(8), z.chunks_exact(8));
    for (w, z) in cw.by_ref().zip(cz.by_ref()) {
        for lane in 0..8 {
            sums[lane] += w[lane] * f64::from(z[lane]);
        }
    }
    let rest: f64 = cw.remainder().iter().zip(cz.remainder()).map(|(w, &z)| w * f64::from(z)).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(rows: &[([f64; 2], usize)]) -> Logits {
        let targets: Vec<_> =
            rows.iter().map(|r| Target { expert: r.1, sign: Sign::Positive }).collect();
        let count = |e| targets.iter().filter(|t| t.expert == e).count() as f64;
        Logits {
            experts: 2,
            values: rows.iter().flat_map(|r| r.0).collect(),
            weights: targets.iter().map(|t| 0.5 / count(t.expert)).collect(),
            targets,
        }
    }

    #[test]
    fn figures_by_hand() {
        // Expert 0: three of four right; expert 1: one of one.
        let l = logits(&[
            ([1.0, 0.0], 0),
            ([1.0, 0.0], 0),
            ([1.0, 0.0], 0),
            ([0.0, 1.0], 0),
            ([0.0, 1.0], 1),
        ]);
        let h = l.figures(1.0, 2, 1);
        assert_eq!(h.tokens, [4, 1]);
        assert_eq!(h.accuracy, [Some(0.75), Some(1.0)]);
        assert_eq!(h.confusion, [0.75, 0.25, 0.0, 1.0]);
        assert_eq!(h.coverage, [Some(0.75), Some(1.0)]);
        assert_eq!(h.load, [0.375, 0.625]);
        let (right, wrong) = ((1.0 + (-1f64).exp()).ln(), (1.0 + 1f64.exp()).ln());
        assert!((h.nll - (0.5 * right + 0.5 * (0.75 * right + 0.25 * wrong))).abs() < 1e-12);
        let both = l.figures(1.0, 2, 2);
        assert_eq!(both.coverage, [Some(1.0), Some(1.0)]);
        assert_eq!(both.load, [0.5, 0.5]);
    }

    #[test]
    fn temperature_is_the_log_odds() {
        // Right in three of four at distance 1 for both: the best factor is ln 3.
        let l = logits(&[
            ([1.0, 0.0], 0),
            ([1.0, 0.0], 0),
            ([1.0, 0.0], 0),
            ([0.0, 1.0], 0),
            ([0.0, 1.0], 1),
            ([0.0, 1.0], 1),
            ([0.0, 1.0], 1),
            ([1.0, 0.0], 1),
        ]);
        let (t, value) = l.best_temperature();
        assert!((t - 3f64.ln()).abs() < 1e-3, "{t}");
        let entropy = -(0.75 * 0.75f64.ln() + 0.25 * 0.25f64.ln());
        assert!((value - entropy).abs() < 1e-5);
    }

    #[test]
    fn useless_logits_get_the_lowest_factor_and_perfect_ones_the_highest() {
        let (t, _) = logits(&[([0.0, 1.0], 0), ([1.0, 0.0], 1)]).best_temperature();
        assert!(t < 0.07, "{t}");
        let (t, _) = logits(&[([1.0, 0.0], 0), ([0.0, 1.0], 1)]).best_temperature();
        assert!(t > 9.0, "{t}");
    }
}

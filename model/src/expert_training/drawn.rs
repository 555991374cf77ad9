//! How much more than before an expert draws tokens that are not its own.

use std::collections::BTreeMap;

use super::{FactorGradients, FactorPair, Factors, GradientError, Lesson, Part, Trainee};
use crate::ops::to_vec;

/// What routers saw of text of other domains before training, and what they made of it.
///
/// Of a router `[experts, hidden]` one row moves, that of the expert: all that can change for a token is the expert's logit
/// against the sum of the others. So the probability `p` of the expert follows from the input and two numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    hidden: usize,
    layers: BTreeMap<usize, Inputs>,
}

/// Of one layer.
#[derive(Debug, Clone, Default, PartialEq)]
struct Inputs {
    /// What the router read, `[tokens, hidden]`.
    x: Vec<f32>,
    /// The expert's logit less the logarithm of the sum of exponentials of the others', `[tokens]`.
    odds: Vec<f64>,
}

/// Bytes that the inputs of routers may take.
const LARGEST: usize = 64 << 20;

impl Drawn {
    /// Runs the model as it is over `batches`, until their inputs fill 64 MiB, and keeps what the routers of the layers whose
    /// rows are trained see and say.
    ///
    /// # Errors
    /// [`GradientError`].
    pub fn new(
        trainee: &Trainee,
        factors: &Factors,
        batches: &[Vec<Lesson>],
        interrupted: &mut (dyn FnMut() -> bool + Send),
    ) -> Result<Self, GradientError> {
        let trained = |at: &&(usize, Part)| at.1 == Part::Router;
        let layers: Vec<usize> = factors.pairs.keys().filter(trained).map(|(l, _)| *l).collect();
        let hidden = trainee.spec().hidden;
        let mut drawn =
            Self { hidden, layers: layers.iter().map(|l| (*l, Inputs::default())).collect() };
        let room = LARGEST / (4 * hidden * layers.len()).max(1);
        for batch in batches {
            let held = drawn.layers.values().next().map_or(room, |l| l.odds.len());
            if held >= room {
                break;
            }
            let lessons: Vec<&Lesson> = batch.iter().collect();
            trainee.see_routers(&lessons, interrupted, &mut |layer, x, logits, expert| {
                let Some(inputs) = drawn.layers.get_mut(&layer) else { return Ok(()) };
                let (x, logits) = (to_vec(x)?, to_vec(logits)?);
                let experts = logits.len() * hidden / x.len().max(1);
                let fits = (room - held) * hidden;
                inputs.x.extend(x.iter().take(fits));
                let rows = logits.chunks_exact(experts.max(1)).take(room - held);
                inputs.odds.extend(rows.map(|row| odds(row, expert)));
                Ok(())
            })?;
        }
        Ok(drawn)
    }

    /// Tokens that are looked at, in each layer.
    pub fn tokens(&self) -> usize {
        self.layers.values().next().map_or(0, |l| l.odds.len())
    }

    /// The penalty, mean over tokens and layers, in nats; `weight` times its gradient is added to `gradients`.
    ///
    /// For a token whose probability of the expert was `q` and is `p`: `KL((q, 1 - q), (p, 1 - p))` where `p > q`, and 0 where
    /// it is not: to draw fewer of them is free. It is the divergence of the router's whole distribution, since among the
    /// other experts nothing moves, and its slope along the logit is `p - q`. For routers of logistic scores `p` is their
    /// softmax too: what is chosen depends on the same order.
    pub fn add(&self, factors: &Factors, weight: f64, gradients: &mut FactorGradients) -> f64 {
        let mut sum = 0.0;
        let count = (self.tokens() * self.layers.len()).max(1) as f64;
        for (layer, Inputs { x, odds }) in &self.layers {
            let at = (*layer, Part::Router);
            let (Some(pair), Some([gradient, _])) =
                (factors.pairs.get(&at), gradients.get_mut(&at))
            else {
                continue;
            };
            let rate = rate(factors, pair);
            let mut slopes = vec![0.0; self.hidden];
            for (x, odds) in x.chunks_exact(self.hidden.max(1)).zip(odds) {
                let moved: f64 =
                    x.iter().zip(&pair.a).map(|(x, a)| f64::from(*x) * f64::from(*a)).sum();
                let (before, now) = (logistic(*odds), logistic(odds + rate * moved));
                let gain = now - before;
                if gain <= 0.0 {
                    continue;
                }
                sum += divergence(*odds, odds + rate * moved);
                slopes.iter_mut().zip(x).for_each(|(s, x)| *s += gain * f64::from(*x));
            }
            let by = weight * rate / count;
            gradient.iter_mut().zip(&slopes).for_each(|(g, s)| *g += (by * s) as f32);
        }
        sum / count
    }
}

/// By how much a step of `a` moves the row.
fn rate(factors: &Factors, pair: &FactorPair) -> f64 {
    f64::from(factors.scale) * f64::from(pair.b[0])
}

/// The logit of `expert` less the logarithm of the sum of exponentials of the others.
fn odds(logits: &[f32], expert: usize) -> f64 {
    let others =
        || logits.iter().enumerate().filter(|(e, _)| *e != expert).map(|(_, l)| f64::from(*l));
    let largest = others().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = others().map(|l| (l - largest).exp()).sum();
    f64::from(logits[expert]) - largest - sum.ln()
}

fn logistic(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// `ln(1 + exp(z))`.
fn softplus(z: f64) -> f64 {
    z.max(0.0) + (-z.abs()).exp().ln_1p()
}

/// `KL((q, 1 - q), (p, 1 - p))` of the probabilities with these log odds.
fn divergence(q: f64, p: f64) -> f64 {
    // ln σ(z) = -softplus(-z); ln(1 - σ(z)) = -softplus(z).
    let own = logistic(q);
    own * (softplus(-p) - softplus(-q)) + (1.0 - own) * (softplus(p) - softplus(q))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expert_training::TrainedFactors;

    fn factors(a: &[f32]) -> Factors {
        let pair = FactorPair {
            rank: 1,
            input: 2,
            output: 1,
            a: a.to_vec(),
            b: vec![0.25],
            trained: TrainedFactors::A,
        };
        Factors { scale: 2.0, pairs: [((3, Part::Router), pair)].into(), dropout: None }
    }

    fn zero() -> FactorGradients {
        [((3, Part::Router), [vec![0.0; 2], Vec::new()])].into()
    }

    #[test]
    fn by_hand() {
        // Three experts of equal logits: the odds of one are 1 : 2.
        assert!((odds(&[0.7, 0.7, 0.7], 1) + 2f64.ln()).abs() < 1e-7);
        assert!((odds(&[1.0, 5.0], 1) - 4.0).abs() < 1e-7);
        // From 1/2 to 3/4: ½ ln(½ / ¾) + ½ ln(½ / ¼).
        let wanted = 0.5 * (2f64 / 3.0).ln() + 0.5 * 2f64.ln();
        assert!((divergence(0.0, 3f64.ln()) - wanted).abs() < 1e-12);
        assert_eq!(divergence(1.5, 1.5), 0.0);
        assert!(divergence(-800.0, 800.0).is_finite());
        // A row that turns away from the token costs nothing; one that turns to it does.
        let inputs = Inputs { x: vec![1.0, 2.0], odds: vec![0.0] };
        let drawn = Drawn { hidden: 2, layers: [(3, inputs)].into() };
        let mut gradients = zero();
        assert_eq!(drawn.add(&factors(&[-1.0, 0.0]), 1.0, &mut gradients), 0.0);
        assert_eq!(gradients, zero());
        // 2 * 0.25 * 2 ln 3 = ln 3: the logit of 3/4.
        let towards = factors(&[2.0 * 3f32.ln(), 0.0]);
        assert!((drawn.add(&towards, 4.0, &mut gradients) - wanted).abs() < 1e-6);
        // Weight 4, rate 0.5, gain 1/4.
        let [found, _] = &gradients[&(3, Part::Router)];
        assert!((found[0] - 0.5).abs() < 1e-5 && (found[1] - 1.0).abs() < 1e-5, "{found:?}");
    }

    #[test]
    fn the_gradient_is_the_slope() {
        let x: Vec<f32> = (0..14).map(|i| ((i * 37) % 23) as f32 / 7.0 - 1.5).collect();
        let odds = (0..7).map(|i| f64::from(i) * 0.7 - 2.5).collect();
        let drawn = Drawn { hidden: 2, layers: [(3, Inputs { x, odds })].into() };
        let at = [0.4, -0.9];
        let mut gradients = zero();
        drawn.add(&factors(&at), 3.0, &mut gradients);
        for i in 0..2 {
            let value = |by: f32| {
                let mut a = at;
                a[i] += by;
                3.0 * drawn.add(&factors(&a), 0.0, &mut zero())
            };
            let slope = (value(1e-3) - value(-1e-3)) / 2e-3;
            let found = f64::from(gradients[&(3, Part::Router)][0][i]);
            assert!((found - slope).abs() < 1e-4, "{i} {found} {slope}");
        }
    }
}

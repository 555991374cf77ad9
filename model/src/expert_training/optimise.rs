//! Steps down a gradient: schedules, clipping, AdamW and plain descent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Damping, FactorGradients, FactorPair, Factors, Part, TrainedFactors};

/// How a gradient becomes a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimiser {
    /// Adam with decoupled weight decay (arXiv 1711.05101), betas 0.9 and 0.999, as PyTorch's `AdamW`.
    AdamW {
        /// Share of each number that a step at learning rate 1 takes away.
        weight_decay: f64,
    },
    /// Plain gradient descent.
    Sgd,
}

/// How the learning rate goes on after its rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine, to 0.
    Cosine,
    /// A straight line, to 0.
    Linear,
    /// As it is.
    Constant,
}

impl Schedule {
    /// The share of the full rate that step `step` of `steps` takes; steps count from 0, and the first `warmup` of them
    /// rise in a straight line.
    pub fn share(self, step: u64, steps: u64, warmup: u64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let rest = steps.saturating_sub(warmup).max(1);
        let done = ((step - warmup) as f64 / rest as f64).min(1.0);
        match self {
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Self::Linear => 1.0 - done,
            Self::Constant => 1.0,
        }
    }
}

/// Moving means of gradients and of their squares, `[a, b]`; empty where nothing is trained.
pub type Moments = BTreeMap<(usize, Part), [Vec<f32>; 2]>;

/// Zeros for every number of `factors` that is trained.
pub fn zeros(factors: &Factors) -> Moments {
    let zeros = |values: &[f32], trained: bool| vec![0.0; if trained { values.len() } else { 0 }];
    let pair = |p: &FactorPair| {
        let [a, b] = p.trains();
        [zeros(&p.a, a), zeros(&p.b, b)]
    };
    factors.pairs.iter().map(|(at, p)| (*at, pair(p))).collect()
}

/// The length of a gradient.
pub fn norm(gradients: &FactorGradients) -> f64 {
    let all = gradients.values().flatten().flatten();
    all.map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt()
}

/// Adds `more` to `sum`, which may be empty.
pub fn accumulate(sum: &mut FactorGradients, more: FactorGradients) {
    if sum.is_empty() {
        *sum = more;
        return;
    }
    for (at, pair) in more {
        let Some(own) = sum.get_mut(&at) else { continue };
        for (own, more) in own.iter_mut().zip(pair) {
            own.iter_mut().zip(more).for_each(|(s, m)| *s += m);
        }
    }
}

/// What a step is made with.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Which one, from 1.
    pub number: u64,
    /// Learning rate.
    pub rate: f64,
    /// Factor on the gradient: less than 1 where it was clipped.
    pub scale: f64,
}

/// Moves `factors` one step; with `damping`, as if they read damped inputs.
pub fn step(
    optimiser: Optimiser,
    step: Step,
    damping: Option<&Damping>,
    factors: &mut Factors,
    gradients: &FactorGradients,
    first: &mut Moments,
    second: &mut Moments,
) {
    for (at, pair) in &mut factors.pairs {
        let (Some(g), Some(m), Some(v)) =
            (gradients.get(at), first.get_mut(at), second.get_mut(at))
        else {
            continue;
        };
        let [ma, mb] = m;
        let [va, vb] = v;
        // The factor that meets the input.
        let reads = [pair.trained != TrainedFactors::B, pair.trained == TrainedFactors::B];
        let input = pair.input;
        let both = [(&mut pair.a, &g[0], ma, va), (&mut pair.b, &g[1], mb, vb)];
        for ((w, g, m, v), reads) in both.into_iter().zip(reads) {
            match damping.filter(|_| reads && !g.is_empty()) {
                None => optimiser.step(step, w, g, m, v),
                Some(damping) => {
                    let (mut g, mut d) = (g.clone(), vec![0.0; g.len()]);
                    damping.damp(*at, &mut g, input);
                    optimiser.step(step, &mut d, &g, m, v); // nothing of a zero decays
                    damping.damp(*at, &mut d, input);
                    let kept = 1.0 - step.rate * optimiser.weight_decay();
                    w.iter_mut().zip(d).for_each(|(w, d)| *w = (f64::from(*w) * kept) as f32 + d);
                }
            }
        }
    }
}

impl Optimiser {
    fn weight_decay(self) -> f64 {
        match self {
            Self::AdamW { weight_decay } => weight_decay,
            Self::Sgd => 0.0,
        }
    }

    fn step(self, step: Step, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        match self {
            Self::AdamW { weight_decay } => adam(step, weight_decay, w, g, m, v),
            Self::Sgd => {
                for (w, g) in w.iter_mut().zip(g) {
                    *w = (f64::from(*w) - step.rate * step.scale * f64::from(*g)) as f32;
                }
            }
        }
    }
}

fn adam(step: Step, decay: f64, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    const BETAS: (f64, f64) = (0.9, 0.999);
    const EPS: f64 = 1e-8;
    let unbiased = |beta: f64| 1.0 - beta.powi(step.number.min(100_000) as i32);
    let (first, second) = (unbiased(BETAS.0), unbiased(BETAS.1).sqrt());
    for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
        let g = f64::from(*g) * step.scale;
        *m = (BETAS.0 * f64::from(*m) + (1.0 - BETAS.0) * g) as f32;
        *v = (BETAS.1 * f64::from(*v) + (1.0 - BETAS.1) * g * g) as f32;
        let kept = f64::from(*w) * (1.0 - step.rate * decay);
        let size = f64::from(*v).sqrt() / second + EPS;
        *w = (kept - step.rate / first * f64::from(*m) / size) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(a: &[f32], b: &[f32]) -> Factors {
        let pair = FactorPair {
            rank: 1,
            input: a.len(),
            output: b.len(),
            a: a.to_vec(),
            b: b.to_vec(),
            trained: TrainedFactors::Both,
        };
        Factors { scale: 1.0, pairs: [((0, Part::Gate), pair)].into(), dropout: None }
    }

    #[test]
    fn schedules_by_hand() {
        let shares = |s: Schedule| (0..6).map(|i| s.share(i, 6, 2)).collect::<Vec<_>>();
        assert_eq!(shares(Schedule::Linear), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(shares(Schedule::Constant), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
        let cosine = shares(Schedule::Cosine);
        assert!((cosine[4] - 0.5).abs() < 1e-12 && cosine[2] == 1.0, "{cosine:?}");
        assert_eq!(Schedule::Linear.share(9, 6, 2), 0.0);
    }

    #[test]
    fn the_first_step_of_adam_is_the_rate_against_the_sign() {
        let mut w = factors(&[1.0, 1.0], &[1.0]);
        let gradients: FactorGradients = [((0, Part::Gate), [vec![3.0, -0.01], vec![0.0]])].into();
        let (mut m, mut v) = (zeros(&w), zeros(&w));
        let adam = Optimiser::AdamW { weight_decay: 0.5 };
        let first = Step { number: 1, rate: 0.1, scale: 1.0 };
        step(adam, first, None, &mut w, &gradients, &mut m, &mut v);
        let pair = &w.pairs[&(0, Part::Gate)];
        // Decay takes 0.05 from each.
        for (found, wanted) in pair.a.iter().chain(&pair.b).zip([0.85, 1.05, 0.95]) {
            assert!((found - wanted).abs() < 1e-5, "{pair:?}");
        }
    }

    #[test]
    fn gradients_add_up_and_have_a_length() {
        let one: FactorGradients = [((0, Part::Up), [vec![3.0], vec![]])].into();
        let mut sum = FactorGradients::new();
        accumulate(&mut sum, one.clone());
        assert_eq!(norm(&sum), 3.0);
        accumulate(&mut sum, one);
        assert_eq!(sum[&(0, Part::Up)], [vec![6.0], vec![]]);
        let mut w = factors(&[1.0], &[2.0]);
        let gradients: FactorGradients = [((0, Part::Gate), [vec![2.0], vec![4.0]])].into();
        let (mut m, mut v) = (zeros(&w), zeros(&w));
        let down = Step { number: 1, rate: 0.5, scale: 0.5 };
        step(Optimiser::Sgd, down, None, &mut w, &gradients, &mut m, &mut v);
        let pair = &w.pairs[&(0, Part::Gate)];
        assert_eq!((pair.a[0], pair.b[0]), (0.5, 1.0));
    }
}

//! What a training is at a step, and the step itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Gates, RouterTraining};

/// Losses of one training step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepLoss {
    /// The objective in nats per token, mean over experts, before the step.
    pub objective: f32,
    /// Load balance, mean over layers, without its weight: 1 is even.
    pub load_balance: f32,
    /// z-loss, mean over layers, without its weight.
    pub z_loss: f32,
}

/// The objective on held-out texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps done before.
    pub step: u64,
    /// Nats per token, mean over experts.
    pub loss: f32,
    /// The same for each expert that has held-out text; `None` for texts whose expert is not known.
    pub by_expert: Vec<(Option<usize>, f32)>,
}

/// Everything that a run needs to go on as if it had never stopped.
///
/// With serde: gates are written as hexadecimal bits, so that any format brings back the same numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingState {
    /// Steps done.
    pub step: u64,
    /// Gates now, by MoE layer, `[experts, hidden]`.
    #[serde(with = "hex")]
    pub gates: Gates,
    /// Gates with the least held-out loss so far; without held-out texts those of the last step.
    #[serde(with = "hex")]
    pub best: Gates,
    /// Step that `best` is from.
    pub best_step: u64,
    /// Losses of all steps.
    pub losses: Vec<StepLoss>,
    /// Held-out losses so far; empty without held-out texts.
    pub evaluations: Vec<Evaluation>,
    /// Gates at the start.
    #[serde(with = "hex")]
    pub(super) start: Gates,
    #[serde(with = "hex")]
    pub(super) first_moments: Gates,
    #[serde(with = "hex")]
    pub(super) second_moments: Gates,
    /// Root mean square of each router's input in the first batch, one number per layer.
    #[serde(with = "hex")]
    pub(super) input_rms: Gates,
    /// Windows that each group has given.
    pub(super) drawn: Vec<u64>,
    /// What the run was begun with.
    pub(super) begun: Option<Begun>,
}

/// What has to stay the same when a run goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Begun {
    pub options: RouterTraining,
    pub texts: u64,
}

impl TrainingState {
    /// A state before the first step.
    ///
    /// * `gates`: by MoE layer, `[experts, hidden]`
    pub fn new(gates: Gates) -> Self {
        let zeros =
            |gates: &Gates| gates.iter().map(|(l, w)| (*l, vec![0.0; w.len()])).collect::<Gates>();
        Self {
            step: 0,
            best: gates.clone(),
            best_step: 0,
            losses: Vec::new(),
            evaluations: Vec::new(),
            first_moments: zeros(&gates),
            second_moments: zeros(&gates),
            input_rms: Gates::new(),
            start: gates.clone(),
            gates,
            drawn: Vec::new(),
            begun: None,
        }
    }

    /// Evaluations since the least held-out loss.
    pub(super) fn stale(&self) -> u64 {
        self.evaluations.iter().filter(|e| e.step > self.best_step).count() as u64
    }

    /// Notes a held-out loss, and the gates if it is the least.
    pub(super) fn note(&mut self, evaluation: Evaluation) {
        let least = self.evaluations.iter().map(|e| e.loss).fold(f32::INFINITY, f32::min);
        if evaluation.loss < least {
            self.best = self.gates.clone();
            self.best_step = self.step;
        }
        self.evaluations.push(evaluation);
    }

    /// One step of Adam (arXiv 1412.6980) on `W rms(z)`.
    ///
    /// * `gradients`: of the loss, by layer, `[experts, hidden]`
    pub(super) fn adam(&mut self, mut gradients: Gates, options: &RouterTraining, hidden: usize) {
        const BETAS: (f64, f64) = (0.9, 0.99);
        const EPS: f64 = 1e-8;
        let done = self.step as f64 / options.steps.max(1) as f64;
        let rate = options.learning_rate * (1.0 - 0.9 * done);
        self.step += 1;
        let unbiased = |beta: f64| 1.0 - beta.powi(self.step.min(100_000) as i32);
        let unbiased = (unbiased(BETAS.0), unbiased(BETAS.1));
        let layers = self.gates.len() as f64;
        for (l, gradient) in &mut gradients {
            let rms = f64::from(self.input_rms[l][0]);
            pull(gradient, &self.gates[l], &self.start[l], options.anchor / layers, rms);
            let Some(w) = self.gates.get_mut(l) else { continue };
            let moments = self
                .first_moments
                .get_mut(l)
                .into_iter()
                .flatten()
                .zip(self.second_moments.get_mut(l).into_iter().flatten());
            for ((w, g), (m, v)) in w.iter_mut().zip(gradient).zip(moments) {
                let g = f64::from(*g) / rms;
                *m = (BETAS.0 * f64::from(*m) + (1.0 - BETAS.0) * g) as f32;
                *v = (BETAS.1 * f64::from(*v) + (1.0 - BETAS.1) * g * g) as f32;
                let direction =
                    f64::from(*m) / unbiased.0 / ((f64::from(*v) / unbiased.1).sqrt() + EPS);
                *w = (f64::from(*w) - rate * direction / (rms * hidden as f64)) as f32;
            }
        }
    }
}

/// Adds the gradient of `weight |W - W0|^2 / |W0|^2`; where `W0` is 0, its place is taken by gates of which the logits have
/// a root mean square near 1.
fn pull(gradient: &mut [f32], now: &[f32], start: &[f32], weight: f64, rms: f64) {
    if weight == 0.0 {
        return;
    }
    let mut scale: f64 = start.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
    if scale == 0.0 {
        scale = 1.0 / (rms * rms);
    }
    for ((g, w), s) in gradient.iter_mut().zip(now).zip(start) {
        *g += (2.0 * weight * (f64::from(*w) - f64::from(*s)) / scale) as f32;
    }
}

/// Gates as text: eight hexadecimal digits per number.
mod hex {
    use super::*;
    use serde::de::Error;
    use serde::{Deserializer, Serializer};
    use std::fmt::Write;

    pub fn serialize<S: Serializer>(gates: &Gates, serializer: S) -> Result<S::Ok, S::Error> {
        let text = |values: &Vec<f32>| {
            values.iter().fold(String::with_capacity(8 * values.len()), |mut text, v| {
                // Writing to a string cannot fail.
                let _ = write!(text, "{:08x}", v.to_bits());
                text
            })
        };
        serializer.collect_map(gates.iter().map(|(l, values)| (l, text(values))))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Gates, D::Error> {
        let number = |digits: &[u8]| {
            std::str::from_utf8(digits)
                .ok()
                .filter(|d| d.len() == 8 && !d.starts_with('+'))
                .and_then(|d| u32::from_str_radix(d, 16).ok())
                .map(f32::from_bits)
                .ok_or_else(|| D::Error::custom("expected eight hexadecimal digits per number"))
        };
        BTreeMap::<usize, String>::deserialize(deserializer)?
            .into_iter()
            .map(|(l, text)| {
                Ok((l, text.as_bytes().chunks(8).map(number).collect::<Result<_, _>>()?))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(gate: &[f32]) -> TrainingState {
        let mut state = TrainingState::new([(3, gate.to_vec())].into());
        state.input_rms = [(3, vec![2.0])].into();
        state
    }

    #[test]
    fn a_first_step_is_the_rate_over_size_and_width() {
        let mut state = started(&[1.0, 1.0, -1.0, 0.0]);
        let options = RouterTraining { learning_rate: 0.8, steps: 2, ..RouterTraining::default() };
        // Two experts, hidden 2, size 2: 0.8 / 4 against the sign of the gradient, whatever its size.
        state.adam([(3, vec![5.0, -0.01, 3.0, 0.0])].into(), &options, 2);
        for (w, wanted) in state.gates[&3].iter().zip([0.8, 1.2, -1.2, 0.0]) {
            assert!((w - wanted).abs() < 1e-5, "{:?}", state.gates);
        }
        assert_eq!((state.step, state.start[&3][0]), (1, 1.0));
        // Half way, the rate is 0.55 of it.
        let before = state.gates[&3][0];
        state.adam([(3, vec![5.0, -0.01, 3.0, 0.0])].into(), &options, 2);
        assert!((before - state.gates[&3][0] - 0.55 * 0.2).abs() < 1e-5);
    }

    #[test]
    fn the_anchor_pulls_relative_to_the_start() {
        let mut gradient = [0.0, 0.0];
        // Two times 0.5 times the distance 1, over |W0|^2 = 25.
        pull(&mut gradient, &[4.0, 4.0], &[3.0, 4.0], 0.5, 1.0);
        assert_eq!(gradient, [0.04, 0.0]);
        pull(&mut gradient, &[1.0, 0.0], &[0.0, 0.0], 0.5, 0.5);
        assert_eq!(gradient, [0.29, 0.0]);
    }

    #[test]
    fn any_bits_come_back_from_text() {
        let mut state = started(&[f32::MIN_POSITIVE / 3.0, -0.0, 1.0 / 3.0, f32::MAX]);
        state.note(Evaluation {
            step: 0,
            loss: 1.0 / 3.0,
            by_expert: vec![(None, 0.1), (Some(2), 3e-9)],
        });
        let text = serde_json::to_string(&state).unwrap();
        assert!(text.contains(r#""gates":{"3":"002aaaab800000003eaaaaab7f7fffff"}"#), "{text}");
        let back: TrainingState = serde_json::from_str(&text).unwrap();
        assert_eq!(back, state);
        assert_eq!(back.gates[&3][1].to_bits(), (-0f32).to_bits());
        for bad in ["002aaaab8", "002aaaag", "+02aaaab", "é02aaaa"] {
            let text = text.replace("002aaaab800000003eaaaaab7f7fffff", bad);
            assert!(serde_json::from_str::<TrainingState>(&text).is_err(), "{bad}");
        }
    }

    #[test]
    fn patience_counts_from_the_least_loss() {
        let mut state = started(&[1.0]);
        for (step, loss) in [(0, 3.0), (5, 2.0), (10, 2.0), (15, 2.5)] {
            (state.step, state.gates) = (step, [(3, vec![step as f32])].into());
            state.note(Evaluation { step, loss, by_expert: Vec::new() });
        }
        assert_eq!((state.best_step, state.stale(), state.best[&3][0]), (5, 2, 5.0));
    }
}

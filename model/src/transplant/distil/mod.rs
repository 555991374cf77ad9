//! MLPs of experts trained together, in all layers, towards their teachers' predictions.
//!
//! A step: draw texts, run them through the student, and go back layer by layer, each computed again from its input. The
//! gradient is that of `KL(teacher, student)` of the next token's distribution, mean over tokens; it reaches the matrices of the
//! experts that are trained and, where routers choose, the routers. AdamW without decay; the rate falls in a straight line to a
//! tenth. Held-out texts are looked at on the way: the best numbers are kept, and training stops when they get no better.
//!
//! A step changes a number by about `learning_rate` times the root mean square of its matrix, whatever the model's width.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};

use moe_merge_checkpoint::Source;

use crate::error::ModelError;

mod network;
mod order;
mod part;
mod taught;

use network::Network;
use order::Order;
use part::Step;

/// Steps in which the rate rises.
const WARM_UP: usize = 20;

/// Which experts tokens visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visits {
    /// All that of the one pupil, with the weight of a router that is certain; routers are left alone.
    Forced,
    /// Those that routers choose, with their weights; the routers are trained too.
    Routed,
}

/// An expert, its texts, and the model that it comes from.
#[derive(Debug, Clone)]
pub struct Pupil<'a> {
    /// Its number in the MoE; of no matter in a dense model.
    pub expert: usize,
    /// What it learns to predict.
    pub teacher: &'a Source,
    /// Texts of its kind, with the token that begins one, where the tokenizer has it.
    pub texts: &'a [Vec<u32>],
    /// Texts to judge by; none is ever trained on.
    pub held_out: &'a [Vec<u32>],
    /// The layers in which it is trained; empty for an expert that stays as it is.
    pub layers: Range<usize>,
}

/// How to train. The same options, texts and models give the same numbers, on any number of threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distillation {
    /// Steps at most.
    pub steps: usize,
    /// About the most that a step changes a number of an MLP, as a share of its matrix's root mean square.
    pub learning_rate: f32,
    /// About the most that a step moves a logit of a router, in nats.
    pub router_rate: f32,
    /// Train a product of this rank beside each matrix, not the matrix itself.
    pub rank: Option<usize>,
    /// Weight of `|x - t|² / |t|²` beside the divergence, with `x` and `t` the student's and the teacher's stream of a token:
    /// mean over tokens and over all layers but the last.
    pub stream: f32,
    /// Tokens of a step, about; at least one text of each pupil.
    pub batch_tokens: usize,
    /// Steps between two looks at held-out text.
    pub evaluate_every: usize,
    /// Looks without gain after which training stops.
    pub patience: usize,
    /// Seed of the order of texts, and of first values.
    pub seed: u64,
}

impl Default for Distillation {
    fn default() -> Self {
        Self {
            steps: 400,
            learning_rate: 0.015,
            router_rate: 0.03,
            rank: None,
            stream: 0.0,
            batch_tokens: 1024,
            evaluate_every: 40,
            patience: 4,
            seed: 0,
        }
    }
}

/// Matrices of one expert in one layer after training.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrices {
    /// The expert.
    pub expert: usize,
    /// The layer.
    pub layer: usize,
    /// Width of the stream, and of the expert.
    pub sizes: [usize; 2],
    /// Gate, up (`[inter, hidden]` each) and down (`[hidden, inter]`), one after the other.
    pub weights: Vec<f32>,
}

/// What training came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Distilled {
    /// Of all experts that were trained.
    pub matrices: Vec<Matrices>,
    /// Routers by layer, `[experts, hidden]`, where they chose.
    pub gates: BTreeMap<usize, Vec<f32>>,
    /// Steps made.
    pub steps: usize,
    /// The step that matrices and routers are from.
    pub best_step: usize,
    /// Divergence of each pupil on its held-out texts before the first step and at the best, in nats per token.
    pub held_out: Vec<Option<[f64; 2]>>,
}

/// Where a run is between two steps: with it, a run goes on as if it had never stopped.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DistillationState {
    /// Steps made.
    pub steps: usize,
    /// Looks at held-out text since the best one.
    pub stale: usize,
    /// The step of the best look.
    pub best_step: usize,
    /// Divergences on held-out text before the first step, and at the best look.
    pub held_out: [Vec<Option<f64>>; 2],
    /// What changes from step to step.
    pub numbers: Vec<Vec<f32>>,
    /// Matrices and routers at the best look.
    pub best: Vec<Vec<f32>>,
}

/// Told of each step, with its loss and a way to have the state after it; `Break` stops.
pub type Told<'a> = dyn FnMut(f64, &mut dyn FnMut() -> DistillationState) -> ControlFlow<()> + 'a;

/// Trains experts of `student` on texts of their kind.
///
/// * `pupils`: of `Visits::Forced` exactly one
/// * `state`: where an earlier run with the same arguments was when it stopped
/// * memory: experts that tokens visit in f32, those that are trained five times over (three times at a low rank), the streams
///   of a batch for each layer, 256 MB of predictions for each pupil
///
/// # Errors
/// [`ModelError::Transplant`] for models that do not go together, a state of another run, or if a loss is not finite; as
/// [`crate::Model::open`] and [`crate::Model::forward`]; [`ModelError::Stopped`].
pub fn distil(
    student: &Source,
    pupils: &[Pupil<'_>],
    visits: Visits,
    options: &Distillation,
    state: Option<DistillationState>,
    told: &mut Told<'_>,
) -> Result<Distilled, ModelError> {
    let network = Network::new(student, pupils, visits, options)?;
    let mut run = Run { network, options, state: DistillationState::default() };
    let order = |p: &Pupil<'_>| Order::new(p.texts, options.seed, p.expert as u64);
    let mut orders: Vec<Order> = pupils.iter().map(order).collect();
    let share = options.batch_tokens.div_ceil(pupils.len().max(1));
    let mut draw = || orders.iter_mut().map(|o| o.next(share)).collect::<Vec<_>>();
    match state {
        Some(state) => {
            run.go_on(state)?;
            (0..run.state.steps).for_each(|_| drop(draw()));
        }
        None => {
            let nats = run.network.held_out(options.batch_tokens)?;
            run.state.held_out = [nats.clone(), nats.clone()];
            run.look(nats);
        }
    }
    while run.state.steps < options.steps && run.state.stale < options.patience.max(1) {
        let loss = run.step(&draw())?;
        if told(loss, &mut || run.state()).is_break() {
            return Err(ModelError::Stopped("distilling was stopped".into()));
        }
    }
    Ok(run.finished())
}

struct Run<'a> {
    network: Network<'a>,
    options: &'a Distillation,
    /// Its numbers are those of the network, and empty here.
    state: DistillationState,
}

impl Run<'_> {
    /// One step, and the look at held-out text that may follow it.
    fn step(&mut self, drawn: &Vec<Vec<usize>>) -> Result<f64, ModelError> {
        let (options, steps) = (self.options, self.state.steps);
        let loss = self.network.gradient(drawn)?;
        if !loss.is_finite() {
            return Err(ModelError::Transplant {
                what: format!("distilling failed in step {}", steps + 1),
                expected: "a finite loss".into(),
                found: loss.to_string(),
            });
        }
        let left = 1.0 - 0.9 * steps as f32 / options.steps as f32;
        let begun = ((steps + 1) as f32 / WARM_UP as f32).min(1.0);
        let [rate, router_rate] =
            [options.learning_rate, options.router_rate].map(|r| r * left * begun);
        self.network.update(Step { number: steps as i32 + 1, rate, router_rate })?;
        self.state.steps += 1;
        let steps = self.state.steps;
        if steps.is_multiple_of(options.evaluate_every.max(1)) || steps == options.steps {
            let nats = self.network.held_out(options.batch_tokens)?;
            self.look(nats);
        }
        Ok(loss)
    }

    /// Keeps what is best.
    fn look(&mut self, nats: Vec<Option<f64>>) {
        let state = &mut self.state;
        if let (Some(now), Some(then)) = (mean(&nats), mean(&state.held_out[1]))
            && now >= then
            && state.steps > 0
        {
            // Steps that have not reached their full rate say little.
            state.stale += usize::from(state.steps > WARM_UP);
            return;
        }
        let learning = self.network.parts.iter().flatten().filter(|p| p.learns());
        let gates = self.network.gates.iter().flatten().map(|g| g.rows.clone());
        state.best = learning.map(|p| p.mlp.flat.clone()).chain(gates).collect();
        (state.stale, state.best_step, state.held_out[1]) = (0, state.steps, nats);
    }

    fn state(&mut self) -> DistillationState {
        let numbers = self.network.numbers().into_iter().map(|n| n.clone()).collect();
        DistillationState { numbers, ..self.state.clone() }
    }

    /// Puts a state in the place of the start.
    fn go_on(&mut self, mut state: DistillationState) -> Result<(), ModelError> {
        let own = self.network.numbers();
        let fits = own.len() == state.numbers.len()
            && own.iter().zip(&state.numbers).all(|(own, new)| {
                // How large a router's input is gets known in the first step.
                own.len() == new.len() || own.is_empty() && new.len() == 1
            });
        if !fits {
            return Err(ModelError::Transplant {
                what: "the state belongs to another run".into(),
                expected: format!("{} lists of numbers", own.len()),
                found: format!("{} lists, or of other lengths", state.numbers.len()),
            });
        }
        let numbers = std::mem::take(&mut state.numbers);
        own.into_iter().zip(numbers).for_each(|(own, new)| *own = new);
        self.state = state;
        Ok(())
    }

    fn finished(self) -> Distilled {
        let (Self { network, state, .. }, mut matrices) = (self, Vec::new());
        let mut best = state.best.into_iter();
        for (layer, parts) in network.parts.iter().enumerate() {
            let learning = parts.iter().filter(|p| p.learns()).zip(best.by_ref());
            matrices.extend(learning.map(|(p, weights)| {
                let sizes = [p.mlp.hidden, p.mlp.inter];
                Matrices { expert: p.expert, layer, sizes, weights }
            }));
        }
        let routed = network.gates.iter().enumerate().filter(|(_, g)| g.is_some());
        let gates = routed.map(|(l, _)| l).zip(best).collect();
        let [first, last] = state.held_out;
        let both = |(a, b): (Option<f64>, Option<f64>)| Some([a?, b?]);
        Distilled {
            matrices,
            gates,
            steps: state.steps,
            best_step: state.best_step,
            held_out: first.into_iter().zip(last).map(both).collect(),
        }
    }
}

/// Mean over the pupils that have held-out text.
fn mean(nats: &[Option<f64>]) -> Option<f64> {
    let known: Vec<f64> = nats.iter().flatten().copied().collect();
    (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn open(name: &str) -> Option<Source> {
        let folder = moe_merge_testkit::shared("golden/arch")?.join(name).display().to_string();
        Some(Source::open(&folder.parse().unwrap(), Path::new(".")).unwrap())
    }

    /// Gradients of a whole student against slopes: of an expert that all tokens visit, and of all experts and routers behind
    /// routers, with another model's predictions, and with its stream too.
    #[test]
    fn gradients_are_slopes() {
        let texts = [vec![1, 5, 9, 3], vec![2, 8, 4]];
        for (name, visits, stream) in [
            ("mixtral", Visits::Forced, 0.0),
            ("qwen2_moe", Visits::Forced, 0.5),
            ("mixtral", Visits::Routed, 0.5),
            ("qwen2_moe", Visits::Routed, 0.0),
            ("olmoe", Visits::Routed, 0.0),
        ] {
            let Some(student) = open(name) else { return };
            let layers = 0..crate::spec::Spec::of(&student).unwrap().layers.len();
            let pupil = |expert| Pupil {
                expert,
                teacher: &student,
                texts: &texts,
                held_out: &[],
                layers: layers.clone(),
            };
            let pupils = match visits {
                Visits::Forced => vec![pupil(1)],
                Visits::Routed => vec![pupil(0), pupil(1)],
            };
            let options = Distillation { stream, ..Distillation::default() };
            let mut network = Network::new(&student, &pupils, visits, &options).unwrap();
            // A model is its own worst teacher: away from it first.
            for part in network.parts.iter_mut().flatten() {
                let numbers = part.mlp.flat.iter_mut().enumerate();
                numbers.for_each(|(i, w)| *w *= 1.0 + 0.5 * ((i % 7) as f32 - 3.0) / 3.0);
            }
            let drawn = vec![vec![0, 1]; pupils.len()];
            network.gradient(&drawn).unwrap();
            let of_layer = |l: usize| -> Vec<f32> {
                let gate = network.gates[l].iter().flat_map(|g| g.gradient.iter());
                let parts = network.parts[l].iter().flat_map(|p| p.gradient.iter());
                parts.chain(gate).copied().collect()
            };
            let gradients: Vec<Vec<f32>> = layers.clone().map(of_layer).collect();
            for (l, gradient) in gradients.iter().enumerate() {
                slopes(&mut network, &drawn, l, gradient, &format!("{name} {visits:?} {l}"));
            }
        }
    }

    /// The loss along the gradient of all numbers of one layer.
    fn slopes(
        network: &mut Network<'_>,
        drawn: &[Vec<usize>],
        l: usize,
        gradient: &[f32],
        what: &str,
    ) {
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 0.0, "{what}");
        let (parts, gate) = (network.parts[l].clone(), network.gates[l].clone());
        let all = parts.iter().filter(|p| p.learns()).flat_map(|p| &p.mlp.flat);
        let length = all.map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
        let drawn = drawn.to_vec();
        let mut value = |by: f64| {
            let step = (by * length / norm) as f32;
            let mut left = gradient;
            let mut moved = |numbers: &mut [f32]| {
                let (own, rest) = left.split_at(numbers.len());
                numbers.iter_mut().zip(own).for_each(|(w, g)| *w += step * g);
                left = rest;
            };
            network.parts[l].clone_from(&parts);
            network.gates[l].clone_from(&gate);
            for part in network.parts[l].iter_mut().filter(|p| p.learns()) {
                moved(&mut part.mlp.flat);
            }
            if let Some(gate) = &mut network.gates[l] {
                moved(&mut gate.rows);
            }
            network.gradient(&drawn).unwrap()
        };
        // Curvature and routers that choose otherwise spoil large steps, rounding small ones.
        let off = [1e-2, 3e-3, 1e-3, 3e-4].map(|by| {
            let slope = (value(by) - value(-by)) / (2.0 * by * length);
            (slope / norm - 1.0).abs()
        });
        let least = off.into_iter().fold(f64::INFINITY, f64::min);
        assert!(least < 5e-3, "{what}: {off:?}");
        network.parts[l].clone_from(&parts);
        network.gates[l].clone_from(&gate);
    }

    /// An expert whose MLPs were disturbed comes back to what the undisturbed model says: whole, and at a low rank.
    #[test]
    fn a_disturbed_expert_is_taught_to_be_itself() {
        let (Some(student), Some(teacher)) = (open("mixtral"), open("mixtral")) else { return };
        let mut disturbed = student.clone();
        for (name, weight) in &mut disturbed.tensors {
            if name.contains(".experts.1.w2") {
                let values = weight.to_f32().unwrap();
                let moved: Vec<f32> = values
                    .iter()
                    .enumerate()
                    .map(|(i, v)| v + 0.1 * ((i % 3) as f32 - 1.0))
                    .collect();
                let new = moe_merge_checkpoint::weight::OwnedWeight::from_f32(
                    name,
                    &moved,
                    weight.shape(),
                    moe_merge_checkpoint::Dtype::F32,
                );
                *weight = std::sync::Arc::new(new);
            }
        }
        let layers = crate::spec::Spec::of(&student).unwrap().layers.len();
        let vocab = crate::spec::Spec::of(&student).unwrap().vocab as u32;
        let text = |seed: u32| (0..16).map(|i| (i * i * 7 + seed * 31 + i) % vocab).collect();
        let texts: Vec<Vec<u32>> = (0..12).map(text).collect();
        let held_out: Vec<Vec<u32>> = (12..16).map(text).collect();
        let pupil = |expert, layers| Pupil {
            expert,
            teacher: &teacher,
            texts: &texts,
            held_out: &held_out,
            layers,
        };
        let plain = Distillation {
            steps: 60,
            batch_tokens: 64,
            evaluate_every: 10,
            patience: 60,
            ..Distillation::default()
        };
        // Texts of chance say nothing about who should be visited.
        let gentle = Distillation { router_rate: 0.003, ..plain };
        for (options, visits, share) in [
            (plain, Visits::Forced, 0.7),
            (Distillation { rank: Some(4), ..plain }, Visits::Forced, 0.85),
            (Distillation { stream: 0.2, ..plain }, Visits::Forced, 0.7),
            (gentle, Visits::Routed, 0.7),
        ] {
            let pupils = match visits {
                Visits::Forced => vec![pupil(1, 0..layers)],
                Visits::Routed => vec![pupil(0, 0..0), pupil(1, 0..layers)],
            };
            let run = || {
                let go = &mut |_: f64, _: &mut dyn FnMut() -> DistillationState| {
                    ControlFlow::Continue(())
                };
                distil(&disturbed, &pupils, visits, &options, None, go).unwrap()
            };
            let found = run();
            let [before, after] = found.held_out.last().unwrap().unwrap();
            assert!(after < share * before, "{options:?} {visits:?}: {before} {after}");
            assert!(found.matrices.iter().all(|m| m.expert == 1));
            assert_eq!(found.gates.len(), if visits == Visits::Routed { layers } else { 0 });
            // Stopped on the way, and gone on from there.
            let (mut made, mut kept) = (0, None);
            let stop = &mut |_: f64, state: &mut dyn FnMut() -> DistillationState| {
                made += 1;
                kept = Some(state());
                if made == 23 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            distil(&disturbed, &pupils, visits, &options, None, stop).unwrap_err();
            assert_eq!(kept.as_ref().unwrap().steps, 23);
            let go =
                &mut |_: f64, _: &mut dyn FnMut() -> DistillationState| ControlFlow::Continue(());
            assert_eq!(distil(&disturbed, &pupils, visits, &options, kept, go).unwrap(), found);
        }
    }
}

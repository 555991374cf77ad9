//! Router-only training: gradients into the gates of a MoE, everything else frozen.
//!
//! A step: draw a balanced batch, run it through the frozen model with the current gates, and go back layer by layer. The
//! activations of as many layers as fit into half a gigabyte are kept for that; of the others only the input and what the
//! routed experts gave, and they are computed again (gradient checkpointing). Logits exist for a chunk of tokens at a time.
//! Memory: those activations, two streams of one batch for each other layer, and the activations of one layer.
//!
//! **What a gate learns.** The choice of experts has no gradient; the weights of the chosen ones have. So an expert that
//! a token does not visit learns nothing from it, and where each token visits one expert with weight 1 there is nothing
//! to learn at all: [`RouterTraining::top_k`] lets a training pass visit more experts than the model does.
//!
//! **Units.** The parameters are `W rms(z)`, with the root mean square of the layer's router inputs in the first batch
//! (leading tokens left out), and a step changes each by at most about `learning_rate / hidden`. A logit `z . W_e` of a
//! token of typical size therefore moves by at most about `learning_rate` in a step, whatever the scale of the features
//! and the width of the model.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use moe_merge_checkpoint::Source;
//! use moe_merge_model::router_training::*;
//!
//! struct Quiet;
//! impl TrainingWatcher for Quiet {
//!     fn progress(&mut self, _: &Progress<'_>) -> ControlFlow<()> {
//!         ControlFlow::Continue(())
//!     }
//! }
//! let source = Source::open(&"models/moe".parse()?, ".".as_ref())?;
//! let start = TrainingState::new(stored_gates(&source)?);
//! let text = TrainingText { tokens: &[1, 5, 7], expert: Some(0), held_out: false, skip: 1 };
//! let trained = train_routers(&source, start, &[text], &RouterTraining::default(), &mut Quiet)?;
//! println!("{:?} after {} steps", trained.stopped, trained.state.step);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use moe_merge_checkpoint::Source;
use moe_merge_kernels::KernelError;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::layer::Keeper;
use crate::ops::to_vec;

mod check;
mod error;
pub(crate) mod head;
mod network;
mod penalty;
mod state;
mod windows;

pub use error::TrainingError;
pub use state::{Evaluation, StepLoss, TrainingState};

use head::Target;
use network::{Halt, Interrupted, Network, Routers};
use windows::{Piece, Pieces};

/// Gates by MoE layer, each `[experts, hidden]`, row-major.
pub type Gates = BTreeMap<usize, Vec<f32>>;

/// A text to train or to evaluate on.
#[derive(Debug, Clone, Copy)]
pub struct TrainingText<'a> {
    /// Its tokens, the beginning-of-text token included where the tokenizer has one.
    pub tokens: &'a [u32],
    /// The expert whose text it is, if known. Losses are averaged per expert, then over experts.
    pub expert: Option<usize>,
    /// Whether it is kept for early stopping, and never trained on.
    pub held_out: bool,
    /// Leading tokens (beginning of text) that are not predicted and that no penalty looks at. They stand before every
    /// window of the text.
    pub skip: usize,
}

/// What the loss is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Objective {
    /// Cross entropy of the next token.
    NextToken,
    /// `KL(oracle, model)` of the next token's distribution. The oracle is the same model with every token, leading ones
    /// included, forced to its text's own expert, at the weight of a router that is certain (1, times the routed scaling
    /// factor where the family has one). Needs [`TrainingText::expert`].
    Distil,
}

/// How to train. The same options, texts, model and start give the same gates, bit for bit, on any number of threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RouterTraining {
    /// Steps in all.
    pub steps: u64,
    /// About the most that a step moves a typical logit, in nats; falls in a straight line to a tenth of it.
    pub learning_rate: f64,
    /// Tokens of a batch, about; every expert gets an equal share, and at least one window.
    pub batch_tokens: usize,
    /// What the loss is.
    pub objective: Objective,
    /// Weight of the load-balancing loss (`E sum_e f_e P_e`, mean over layers; arXiv 2101.03961).
    pub load_balance: f64,
    /// Weight of the z-loss (mean squared log-sum-exp of the logits, mean over layers; arXiv 2202.08906).
    pub z_loss: f64,
    /// Weight of the pull back to the starting gates: `|W - W0|^2 / |W0|^2`, mean over layers.
    pub anchor: f64,
    /// Seed of the order of windows.
    pub seed: u64,
    /// Steps between two looks at the held-out texts.
    pub evaluate_every: u64,
    /// Evaluations without a smaller held-out loss after which training stops.
    pub patience: u64,
    /// Tokens of a window, leading ones included; longer texts are cut.
    pub window: usize,
    /// Experts per token in training passes; the model's own number if absent. Held-out losses always use the model's.
    /// With all experts every gate row learns from every token: from poor gates that is much faster (`models/tiny`, top-2
    /// of 4, random start: held-out 1.096 instead of 1.143 nats after 25 steps, 1.083 instead of 1.089 after 100).
    pub top_k: Option<usize>,
}

impl Default for RouterTraining {
    fn default() -> Self {
        Self {
            steps: 200,
            learning_rate: 1.0,
            batch_tokens: 1024,
            objective: Objective::NextToken,
            load_balance: 0.0,
            z_loss: 0.0,
            anchor: 0.0,
            seed: 0,
            evaluate_every: 10,
            patience: 5,
            window: 128,
            top_k: None,
        }
    }
}

/// Where a run is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Steps in all.
    pub steps: u64,
    /// Losses of the step just done; none before the first one of this call.
    pub step: Option<StepLoss>,
    /// Held-out loss, if it was taken after this step.
    pub evaluation: Option<&'a Evaluation>,
    /// Tokens trained on per second, in this call, evaluations left out.
    pub tokens_per_second: f64,
    /// What would have to be saved now to go on from here.
    pub state: &'a TrainingState,
}

/// Told what happens during a run.
pub trait TrainingWatcher {
    /// A step, with the evaluation that may follow it, is done (and once before the first step). `Break` stops the run.
    fn progress(&mut self, progress: &Progress<'_>) -> ControlFlow<()>;

    /// Asked between layers; `true` gives up the step at hand and stops the run at the end of the step before.
    fn interrupted(&mut self) -> bool {
        false
    }
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// All steps are done.
    Finished,
    /// The held-out loss did not fall any more.
    NoGain,
    /// The watcher asked for it: the state can be resumed.
    Interrupted,
}

/// The result of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// Why it ended.
    pub stopped: Stopped,
    /// Best gates ([`TrainingState::best`]), losses, and all it needs to go on.
    pub state: TrainingState,
    /// Numbers of texts that were left out because they have no token to predict.
    pub unused_texts: Vec<usize>,
}

/// Loss and gradient at given gates.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterGradient {
    /// Objective plus weighted penalties (without the anchor, which is 0 at the start of a training).
    pub loss: f64,
    /// Objective for each expert.
    pub by_expert: Vec<(Option<usize>, f64)>,
    /// Of `loss` with respect to every gate.
    pub gates: Gates,
}

/// The gates that a model comes with, widened to f32.
///
/// # Errors
/// As [`crate::Model::open`].
pub fn stored_gates(source: &Source) -> Result<Gates, ModelError> {
    Network::open(source)?.stored_gates()
}

/// Trains the routers of the MoE in `source` from `start` on: a new state, or one that an earlier run left.
///
/// * `source`'s own gates are not looked at: [`stored_gates`] gives them
/// * a state that was saved and read back goes on as if it had never stopped
///
/// # Errors
/// [`TrainingError::Parameter`], [`TrainingError::Text`], [`TrainingError::State`], [`TrainingError::NoGradient`] before the
/// first step; [`TrainingError::NotFinite`] with the last good state; [`TrainingError::Model`].
pub fn train_routers(
    source: &Source,
    start: TrainingState,
    texts: &[TrainingText<'_>],
    options: &RouterTraining,
    watcher: &mut dyn TrainingWatcher,
) -> Result<Trained, TrainingError> {
    let network = Network::open(source)?;
    let pieces = check::pieces(&network, texts, options)?;
    if pieces.train.iter().all(Vec::is_empty) {
        return Err(TrainingError::Text {
            text: "none".into(),
            expected: "at least one text of two tokens that is not held out".into(),
            found: format!("{} texts", texts.len()),
        });
    }
    let state = check::state(&network, start, texts, options, &pieces)?;
    let mut run = Run { network, pieces, options, state, teacher: Teacher::default() };
    let stopped = run.go(watcher)?;
    Ok(Trained { stopped, state: run.state, unused_texts: run.pieces.unused })
}

/// Loss and gradient of all `texts` as one batch, held-out ones included.
///
/// # Errors
/// As [`train_routers`].
pub fn router_gradient(
    source: &Source,
    gates: &Gates,
    texts: &[TrainingText<'_>],
    options: &RouterTraining,
) -> Result<RouterGradient, TrainingError> {
    let network = Network::open(source)?;
    let pieces = check::pieces(&network, texts, options)?;
    let state = TrainingState::new(gates.clone());
    let state = check::state(&network, state, texts, options, &pieces)?;
    let mut run = Run { network, pieces, options, state, teacher: Teacher::default() };
    let pieces = std::mem::take(&mut run.pieces);
    let batch: Vec<&Piece> = pieces.train.iter().flatten().chain(&pieces.held_out).collect();
    let found = match run.gradient(&batch, &pieces.groups, &mut || false) {
        Ok(found) => found,
        Err(halt) => return Err(run.failure(halt).unwrap_or_else(nobody_interrupts)),
    };
    let penalties = options.load_balance * found.load_balance + options.z_loss * found.z;
    let by_expert = found.sums.by_expert(&pieces.groups);
    Ok(RouterGradient { loss: found.sums.mean() + penalties, by_expert, gates: found.gates })
}

fn nobody_interrupts() -> TrainingError {
    ModelError::Stopped("interrupted".into()).into()
}

/// Bytes of teacher states that are kept; what is beyond is computed again.
const TEACHER_STATES: usize = 512 << 20;

/// States of the oracle after the last norm, by window. Each window goes through the model on its own, so that its numbers
/// do not depend on the batch it was first drawn in.
#[derive(Default)]
struct Teacher {
    states: HashMap<usize, Arc<[f32]>>,
    held: usize,
}

/// A run and what it needs.
struct Run<'a> {
    network: Network,
    pieces: Pieces,
    options: &'a RouterTraining,
    state: TrainingState,
    teacher: Teacher,
}

/// Loss and gradient of a batch.
struct BatchGradient {
    sums: Sums,
    load_balance: f64,
    z: f64,
    gates: Gates,
}

/// Sum of losses and number of tokens, by group.
struct Sums(Vec<(f64, usize)>);

impl Sums {
    fn add(&mut self, places: &Places, nats: &[f64]) {
        for (group, nats) in places.groups.iter().zip(nats) {
            self.0[*group].0 += nats;
            self.0[*group].1 += 1;
        }
    }

    fn means(&self) -> impl Iterator<Item = (usize, f64)> {
        let some = self.0.iter().enumerate().filter(|(_, s)| s.1 > 0);
        some.map(|(group, (sum, count))| (group, sum / *count as f64))
    }

    /// Mean over groups of their means.
    fn mean(&self) -> f64 {
        self.means().map(|(_, m)| m).sum::<f64>() / self.means().count().max(1) as f64
    }

    fn by_expert(&self, groups: &[Option<usize>]) -> Vec<(Option<usize>, f64)> {
        self.means().map(|(group, mean)| (groups[group], mean)).collect()
    }
}

/// The rows of a batch whose predictions count.
struct Places {
    /// Rows of the batch's matrix.
    rows: Vec<usize>,
    next: Vec<u32>,
    groups: Vec<usize>,
}

impl Places {
    fn of(batch: &[&Piece]) -> Self {
        let mut places = Self { rows: Vec::new(), next: Vec::new(), groups: Vec::new() };
        let mut from = 0;
        for piece in batch {
            for at in piece.scored() {
                places.rows.push(from + at - 1);
                places.next.push(piece.tokens[at]);
                places.groups.push(piece.group);
            }
            from += piece.tokens.len();
        }
        places
    }

    /// Weights of the rows in the mean over groups of their means.
    fn weights(&self) -> Vec<f32> {
        let mut counts = BTreeMap::<usize, usize>::new();
        self.groups.iter().for_each(|g| *counts.entry(*g).or_default() += 1);
        let groups = counts.len();
        self.groups.iter().map(|g| (1.0 / (groups * counts[g]) as f64) as f32).collect()
    }

    /// Those rows of `x [tokens, hidden]`.
    fn gather(&self, x: &Tensor, hidden: usize) -> Result<Vec<f32>, ModelError> {
        let all = to_vec(x)?;
        let mut rows = Vec::with_capacity(self.rows.len() * hidden);
        for row in &self.rows {
            rows.extend_from_slice(&all[row * hidden..(row + 1) * hidden]);
        }
        Ok(rows)
    }
}

impl Run<'_> {
    fn go(&mut self, watcher: &mut dyn TrainingWatcher) -> Result<Stopped, TrainingError> {
        let (mut trained, mut time, mut step) = (0, Duration::ZERO, None);
        loop {
            if self.evaluation_due()
                && let Err(halt) = self.evaluate(&mut || watcher.interrupted())
            {
                return self.failure(halt).map_or(Ok(Stopped::Interrupted), Err);
            }
            let flow = watcher.progress(&Progress {
                steps: self.options.steps,
                step,
                evaluation: self.state.evaluations.last().filter(|e| e.step == self.state.step),
                tokens_per_second: trained as f64 / time.as_secs_f64().max(1e-9),
                state: &self.state,
            });
            if self.state.step >= self.options.steps {
                return Ok(Stopped::Finished);
            }
            if self.state.stale() >= self.options.patience {
                return Ok(Stopped::NoGain);
            }
            if flow.is_break() {
                return Ok(Stopped::Interrupted);
            }
            let started = Instant::now();
            match self.step(&mut || watcher.interrupted()) {
                Ok((loss, tokens)) => (step, trained) = (Some(loss), trained + tokens),
                Err(halt) => return self.failure(halt).map_or(Ok(Stopped::Interrupted), Err),
            }
            time += started.elapsed();
        }
    }

    /// Whether the held-out texts have to be looked at before the next step.
    fn evaluation_due(&self) -> bool {
        let step = self.state.step;
        let turn = step.is_multiple_of(self.options.evaluate_every) || step == self.options.steps;
        let done = self.state.evaluations.last().is_some_and(|e| e.step == step);
        turn && !done && !self.pieces.held_out.is_empty()
    }

    /// The error that `halt` stands for; none if somebody asked for it.
    fn failure(&self, halt: Halt) -> Option<TrainingError> {
        match halt {
            Halt::Interrupted => None,
            Halt::Failed(ModelError::Router { layer, source: KernelError::NotFinite { .. } }) => {
                Some(self.not_finite(format!("a router logit of layer {layer}")))
            }
            Halt::NotFinite(what) => Some(self.not_finite(what)),
            Halt::Failed(error) => Some(error.into()),
        }
    }

    fn not_finite(&self, what: String) -> TrainingError {
        let state = Box::new(self.state.clone());
        TrainingError::NotFinite { step: self.state.step, what, state }
    }

    /// One step; the state changes only if all of it went well. Returns losses and tokens.
    fn step(&mut self, interrupted: &mut Interrupted<'_>) -> Result<(StepLoss, usize), Halt> {
        let mut drawn = self.state.drawn.clone();
        let pieces = std::mem::take(&mut self.pieces);
        let batch = pieces.draw(&mut drawn, self.options.seed, self.options.batch_tokens);
        let found = self.gradient(&batch, &pieces.groups, interrupted);
        let tokens = batch.iter().map(|p| p.tokens.len()).sum();
        drop(batch);
        self.pieces = pieces;
        let found = found?;
        let loss = StepLoss {
            objective: found.sums.mean() as f32,
            load_balance: found.load_balance as f32,
            z_loss: found.z as f32,
        };
        self.state.drawn = drawn;
        self.state.adam(found.gates, self.options, self.network.spec.hidden);
        self.state.losses.push(loss);
        if self.pieces.held_out.is_empty() {
            self.state.best = self.state.gates.clone();
            self.state.best_step = self.state.step;
        }
        Ok((loss, tokens))
    }

    /// Loss of a batch and its gradient with respect to the gates.
    fn gradient(
        &mut self,
        pieces: &[&Piece],
        groups: &[Option<usize>],
        interrupted: &mut Interrupted<'_>,
    ) -> Result<BatchGradient, Halt> {
        let places = Places::of(pieces);
        let teacher = self.teacher_states(pieces, interrupted)?;
        let network = &self.network;
        let (hidden, top_k) = (network.spec.hidden, self.options.top_k);
        let counted: Vec<bool> =
            pieces.iter().flat_map(|p| (0..p.tokens.len()).map(|i| i >= p.skip)).collect();
        let batch = network.batch(pieces)?;
        let routers = Routers::Gates(network.tensors(&self.state.gates)?, top_k);
        let first = self.state.gates.keys().next().copied().unwrap_or(0);
        let (mut kept, mut rms, mut keeper) = (Vec::new(), Gates::new(), Keeper::default());
        let stream = network.forward(&batch, &routers, interrupted, |l, passed, trail| {
            if l >= first {
                kept.push(keeper.keep(trail, &passed.routed));
            }
            if passed.logits.is_some() && !self.state.input_rms.contains_key(&l) {
                let rows = to_vec(&passed.mlp_input)?;
                rms.insert(l, vec![root_mean_square(&rows, hidden, &counted)]);
            }
            Ok(())
        })?;
        for (l, rms) in &rms {
            if !(rms[0].is_finite() && rms[0] > 0.0) {
                return Err(Halt::NotFinite(format!("the size of the router inputs of layer {l}")));
            }
        }
        self.state.input_rms.extend(rms);
        let rows = places.gather(&stream, hidden)?;
        let target = teacher.as_deref().map_or(Target::Next(&places.next), Target::Teacher);
        let losses = network.head()?.losses(&rows, &target, Some(&places.weights()))?;
        let mut sums = Sums(vec![(0.0, 0); groups.len()]);
        sums.add(&places, &losses.nats);
        if !sums.mean().is_finite() {
            return Err(Halt::NotFinite("the training loss".into()));
        }
        let mut d_stream = vec![0.0; stream.elem_count()];
        let d_rows = losses.gradient.unwrap_or_default();
        for (row, d) in places.rows.iter().zip(d_rows.chunks_exact(hidden)) {
            d_stream[row * hidden..(row + 1) * hidden].copy_from_slice(d);
        }
        let penalties = (self.options.load_balance, self.options.z_loss);
        let back = network::Back { batch: &batch, routers: &routers, counted: &counted, penalties };
        let found = network.backward(&back, kept, d_stream, interrupted)?;
        for (l, gradient) in &found.gates {
            if gradient.iter().any(|g| !g.is_finite()) {
                return Err(Halt::NotFinite(format!("the gradient of the gates of layer {l}")));
            }
        }
        let (load_balance, z, gates) = (found.load_balance, found.z, found.gates);
        Ok(BatchGradient { sums, load_balance, z, gates })
    }

    /// The held-out loss with the gates now.
    fn evaluate(&mut self, interrupted: &mut Interrupted<'_>) -> Result<(), Halt> {
        let pieces = std::mem::take(&mut self.pieces);
        let sums = self.held_out(&pieces, interrupted);
        self.pieces = pieces;
        let sums = sums?;
        let loss = sums.mean() as f32;
        if !loss.is_finite() {
            return Err(Halt::NotFinite("the held-out loss".into()));
        }
        let by_expert = sums.by_expert(&self.pieces.groups);
        let by_expert = by_expert.into_iter().map(|(e, loss)| (e, loss as f32)).collect();
        self.state.note(Evaluation { step: self.state.step, loss, by_expert });
        Ok(())
    }

    fn held_out(
        &mut self,
        pieces: &Pieces,
        interrupted: &mut Interrupted<'_>,
    ) -> Result<Sums, Halt> {
        let mut sums = Sums(vec![(0.0, 0); pieces.groups.len()]);
        let hidden = self.network.spec.hidden;
        let routers = Routers::Gates(self.network.tensors(&self.state.gates)?, None);
        let mut rest = &pieces.held_out[..];
        while !rest.is_empty() {
            let (mut count, mut tokens) = (0, 0);
            while count < rest.len() && (count == 0 || tokens < self.options.batch_tokens) {
                tokens += rest[count].tokens.len();
                count += 1;
            }
            let batch: Vec<&Piece> = rest[..count].iter().collect();
            rest = &rest[count..];
            let places = Places::of(&batch);
            let teacher = self.teacher_states(&batch, interrupted)?;
            let network = &self.network;
            let batch = network.batch(&batch)?;
            let stream = network.forward(&batch, &routers, interrupted, |_, _, _| Ok(()))?;
            let target = teacher.as_deref().map_or(Target::Next(&places.next), Target::Teacher);
            let rows = places.gather(&stream, hidden)?;
            sums.add(&places, &network.head()?.losses(&rows, &target, None)?.nats);
        }
        Ok(sums)
    }

    /// States of the oracle for the rows that count, `[rows, hidden]`; none if there is no teacher.
    fn teacher_states(
        &mut self,
        pieces: &[&Piece],
        interrupted: &mut Interrupted<'_>,
    ) -> Result<Option<Vec<f32>>, Halt> {
        if self.options.objective == Objective::NextToken {
            return Ok(None);
        }
        let hidden = self.network.spec.hidden;
        let mut all = Vec::new();
        for piece in pieces {
            if let Some(states) = self.teacher.states.get(&piece.id) {
                all.extend_from_slice(states);
                continue;
            }
            let batch = self.network.batch(&[piece])?;
            // That every text has a label was checked.
            let label = piece.expert.unwrap_or(0) as u32;
            let routers = Routers::Forced(vec![label; piece.tokens.len()]);
            let stream = self.network.forward(&batch, &routers, interrupted, |_, _, _| Ok(()))?;
            let rows = Places::of(&[piece]).gather(&stream, hidden)?;
            let states: Arc<[f32]> = self.network.head()?.states(&rows)?.into();
            all.extend_from_slice(&states);
            let bytes = states.len() * size_of::<f32>();
            if self.teacher.held + bytes <= TEACHER_STATES {
                self.teacher.held += bytes;
                self.teacher.states.insert(piece.id, states);
            }
        }
        Ok(Some(all))
    }
}

/// Of the rows that count.
fn root_mean_square(rows: &[f32], width: usize, counted: &[bool]) -> f32 {
    let (mut sum, mut count) = (0.0, 0);
    for (row, _) in rows.chunks_exact(width).zip(counted).filter(|(_, c)| **c) {
        sum += row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
        count += width;
    }
    (sum / f64::from(count.max(1) as u32)).sqrt() as f32
}

//! Router-only training of an existing MoE: which texts, which are held out, and where the state is kept.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::{CheckpointError, Source};
use moe_merge_model::Spec;
use moe_merge_model::router_training::{
    Gates, Objective, Progress, RouterTraining, Stopped, TrainingError, TrainingState,
    TrainingText, TrainingWatcher, train_routers,
};
use moe_merge_router::Sign;
use serde::Serialize;

use crate::build::{Observer, Stage};
use crate::error::MergeError;
use crate::gates::TokenPrompts;
use crate::lessons::Lessons;

/// One prompt of each expert in so many is held out.
const HELD_OUT: usize = 6;

/// What a person asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Steps at most.
    pub steps: u64,
    /// See [`RouterTraining::learning_rate`].
    pub learning_rate: f64,
    /// What the loss is.
    pub objective: Objective,
    /// Weight of the load-balancing loss.
    pub load_balance: f64,
    /// Weight of the z-loss.
    pub z_loss: f64,
    /// File that keeps the state: a run that was stopped goes on from it.
    pub state: Option<PathBuf>,
}

/// What a training did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainSummary {
    /// Steps done, those of earlier runs included.
    pub steps: u64,
    /// The step that the routers are from.
    pub best_step: u64,
    /// Why it ended: `finished`, `no_gain`.
    pub stopped: &'static str,
    /// Held-out loss in nats per token before the first step and at the best, where prompts were held out.
    pub held_out: Option<[f32; 2]>,
    /// Tokens per second.
    pub tokens_per_second: f64,
}

pub(crate) struct Training<'a> {
    pub moe: &'a Source,
    pub experts: &'a [TokenPrompts],
    pub bos: bool,
    pub seed: u64,
    pub options: &'a TrainOptions,
    pub interrupt: &'a Interrupt,
}

impl Training<'_> {
    /// Whether a file keeps the state of a run that can go on.
    pub fn begun(&self) -> bool {
        self.options.state.as_ref().is_some_and(|p| p.is_file())
    }

    /// Trains the routers from `start`, or from the state that an earlier run has left.
    ///
    /// # Errors
    /// As [`train_routers`]; interruption, after which the state is in its file; a state that cannot be read or written.
    pub fn run(
        &self,
        start: Gates,
        observer: &dyn Observer,
    ) -> Result<(Gates, TrainSummary), MergeError> {
        let (train, held_out) = self.texts()?;
        let skip = usize::from(self.bos);
        let text = |held_out| {
            move |(tokens, expert): &'_ (Vec<u32>, usize)| (tokens.clone(), *expert, held_out)
        };
        let all: Vec<_> =
            train.iter().map(text(false)).chain(held_out.iter().map(text(true))).collect();
        let texts: Vec<TrainingText<'_>> = all
            .iter()
            .map(|(tokens, expert, held_out)| TrainingText {
                tokens,
                expert: Some(*expert),
                held_out: *held_out,
                skip,
            })
            .collect();
        let o = self.options;
        let options = RouterTraining {
            steps: o.steps,
            learning_rate: o.learning_rate,
            objective: o.objective,
            load_balance: o.load_balance,
            z_loss: o.z_loss,
            seed: self.seed,
            evaluate_every: (o.steps / 20).clamp(1, 25),
            ..RouterTraining::default()
        };
        let state = match &o.state {
            Some(path) if path.is_file() => read(path)?,
            _ => TrainingState::new(start),
        };
        observer.stage(Stage::Train, o.steps.saturating_sub(state.step));
        let mut watcher = Watcher {
            observer,
            interrupt: self.interrupt,
            file: o.state.as_deref(),
            saved: Instant::now(),
            speed: 0.0,
            failed: None,
        };
        let trained = train_routers(self.moe, state, &texts, &options, &mut watcher);
        watcher.failed.take().map_or(Ok(()), Err)?;
        let trained = trained.map_err(|e| keep(e, o.state.as_deref()))?;
        if let Some(path) = &o.state {
            save(path, &trained.state)?;
        }
        let stopped = match trained.stopped {
            Stopped::Interrupted => return Err(CheckpointError::Interrupted.into()),
            Stopped::Finished => "finished",
            Stopped::NoGain => "no_gain",
        };
        let losses = trained.state.evaluations.iter().map(|e| e.loss);
        let best = losses.clone().fold(f32::INFINITY, f32::min);
        let summary = TrainSummary {
            steps: trained.state.step,
            best_step: trained.state.best_step,
            stopped,
            held_out: losses.into_iter().next().map(|first| [first, best]),
            tokens_per_second: watcher.speed,
        };
        Ok((trained.state.best, summary))
    }

    /// Texts to train on and texts held out, each with its expert. What is made of prompts is made of the former alone.
    #[expect(clippy::type_complexity, reason = "two lists of the same kind")]
    fn texts(&self) -> Result<(Vec<(Vec<u32>, usize)>, Vec<(Vec<u32>, usize)>), MergeError> {
        let (mut kept, mut held_out) = (Vec::new(), Vec::new());
        for (expert, prompts) in self.experts.iter().enumerate() {
            let mut train = TokenPrompts::default();
            for (i, prompt) in prompts.positive.iter().enumerate() {
                if i % HELD_OUT == HELD_OUT - 1 {
                    held_out.push((prompt.clone(), expert));
                } else {
                    train.positive.push(prompt.clone());
                }
            }
            kept.push(train);
        }
        let spec = Spec::of(self.moe)?;
        // The cost of a token is paid once for each step that draws it, not here.
        let lessons = Lessons::new(&kept, self.bos, 1, spec.max_positions, self.seed);
        let rows = lessons.tokens.iter();
        let mut at = 0;
        let mut train = Vec::new();
        for sequence in lessons.sequences {
            let expert = rows.as_slice()[at].expert;
            at += sequence.len();
            train.push((sequence, expert));
        }
        debug_assert!(lessons.prompts.iter().all(|p| p.1 == Sign::Positive));
        Ok((train, held_out))
    }
}

struct Watcher<'a> {
    observer: &'a dyn Observer,
    interrupt: &'a Interrupt,
    file: Option<&'a Path>,
    saved: Instant,
    speed: f64,
    failed: Option<MergeError>,
}

/// Seconds between two saves.
const SAVE_EVERY: u64 = 30;

impl TrainingWatcher for Watcher<'_> {
    fn progress(&mut self, progress: &Progress<'_>) -> ControlFlow<()> {
        if progress.step.is_some() {
            self.observer.advance(1);
        }
        self.speed = progress.tokens_per_second;
        if let Some(path) = self.file
            && self.saved.elapsed().as_secs() >= SAVE_EVERY
        {
            self.saved = Instant::now();
            if let Err(error) = save(path, progress.state) {
                self.failed = Some(error);
                return ControlFlow::Break(());
            }
        }
        match self.interrupt.check() {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }

    fn interrupted(&mut self) -> bool {
        self.interrupt.check().is_err()
    }
}

/// The error, after its last good state was put away.
fn keep(error: TrainingError, file: Option<&Path>) -> MergeError {
    if let (TrainingError::NotFinite { state, .. }, Some(path)) = (&error, file)
        && let Err(other) = save(path, state)
    {
        return other;
    }
    error.into()
}

fn read(path: &Path) -> Result<TrainingState, MergeError> {
    let bytes = std::fs::read(path).map_err(|e| CheckpointError::io("reading", path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        CheckpointError::Malformed {
            what: "this is no state of a router training".into(),
            file: path.to_owned(),
            tensor: None,
            expected: "what `calibrate --steps N --state FILE` writes".into(),
            found: e.to_string(),
            hint: Some("name another file; it is made when it is not there".into()),
        }
        .into()
    })
}

/// Replaces the file in one step.
fn save(path: &Path, state: &TrainingState) -> Result<(), MergeError> {
    let failed = |e| CheckpointError::io("writing", path, e);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    let text = serde_json::to_vec(state).map_err(|e| failed(e.into()))?;
    file.write_all(&text).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

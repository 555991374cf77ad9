//! The steps: draw batches, walk forward and back, step, look at held-out text.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use moe_merge_checkpoint::{CheckpointError, Interrupt};
use moe_merge_model::expert_training::optimise::{self, Optimiser, Schedule};
use moe_merge_model::expert_training::{
    Damping, Drawn, Dropout, FactorGradients, Factors, Goal, GradientError, Lesson, Trainee,
};
use serde::Serialize;

use super::batches::{Round, random_key, shuffled};
use super::data::Corpus;
use super::error::FinetuneError;
use super::state::{EvaluationRecord, State, StepRecord};

/// How to train. The same options, text, model and seed give the same factors, bit for bit, on any number of threads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Training {
    /// Rounds through the text, where no number of steps is given.
    pub epochs: u64,
    /// Steps, whatever the rounds.
    pub steps: Option<u64>,
    /// How a gradient becomes a step.
    pub optimiser: Optimiser,
    /// Largest learning rate.
    pub learning_rate: f64,
    /// How it goes on.
    pub schedule: Schedule,
    /// Steps in which it rises.
    pub warmup: u64,
    /// Longest gradient; a longer one is made so long. 0: any.
    pub clip: f64,
    /// Tokens of a batch at most.
    pub batch_tokens: usize,
    /// Batches of a step.
    pub accumulate: usize,
    /// Steps between two looks at held-out text; 0: ten in all.
    pub evaluate_every: u64,
    /// Looks without a smaller loss after which training stops; 0: never.
    pub patience: u64,
    /// Share of the inputs of `A` that each batch leaves out (low rank alone); 0: none.
    pub dropout: f64,
    /// Seed of everything random.
    pub seed: u64,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            epochs: 1,
            steps: None,
            optimiser: Optimiser::AdamW { weight_decay: 0.0 },
            learning_rate: 1e-3,
            schedule: Schedule::Cosine,
            warmup: 0,
            clip: 1.0,
            batch_tokens: 2048,
            accumulate: 1,
            evaluate_every: 0,
            patience: 0,
            dropout: 0.0,
            seed: 0,
        }
    }
}

/// Where a run is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Steps in all.
    pub steps: u64,
    /// Steps made.
    pub done: u64,
    /// The step just made; none before the first one of this call.
    pub step: Option<&'a StepRecord>,
    /// The look at held-out text that followed it, if one did.
    pub evaluation: Option<&'a EvaluationRecord>,
}

/// Told what happens.
pub trait Watcher {
    /// Something begins that takes a while: `reading text`, `training`, ….
    fn stage(&mut self, what: &str);

    /// A step is made, with the look at held-out text that may follow it.
    fn progress(&mut self, progress: &Progress<'_>);
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stopped {
    /// All steps are made.
    Finished,
    /// The loss on held-out text did not fall any more.
    NoGain,
}

/// Seconds between two saves, beside those after each look at held-out text.
const SAVE_EVERY: u64 = 30;

/// Text on which the model is to stay as it was.
pub struct Kept {
    /// The model, routed as its routers say.
    pub model: Trainee,
    /// The text, in batches: each step takes the next one.
    pub batches: Vec<Vec<Lesson>>,
    /// Weight of `KL(before, now)`.
    pub weight: f64,
    /// Small steps where its inputs lie.
    pub damping: Damping,
    /// What the model made of batches, as many as there is room for.
    pub said: BTreeMap<usize, Vec<f32>>,
}

/// Bytes that may be kept of what the model said.
const SAID: usize = 256 << 20;

impl Kept {
    /// The gradient of what pulls the model back, on the batch of step `step`.
    fn gradient(
        &mut self,
        step: u64,
        factors: &Factors,
        interrupted: &mut (dyn FnMut() -> bool + Send),
    ) -> Result<FactorGradients, GradientError> {
        let Self { model, batches, said, .. } = self;
        let number = (step % batches.len().max(1) as u64) as usize;
        let Some(batch) = batches.get(number) else { return Ok(FactorGradients::new()) };
        let lessons: Vec<&Lesson> = batch.iter().collect();
        let scored: usize = batch.iter().map(Lesson::scored).sum();
        let weight = (self.weight / scored.max(1) as f64) as f32;
        let states = match said.remove(&number) {
            Some(states) => states,
            None => model.said(&lessons, interrupted)?,
        };
        let found =
            model.gradient(factors, &lessons, &Goal::Said(model, &states), weight, interrupted)?;
        let held: usize = said.values().map(|s| size_of_val(&s[..])).sum();
        if held + size_of_val(&states[..]) <= SAID {
            said.insert(number, states);
        }
        Ok(found.factors)
    }
}

/// What keeps a router from drawing tokens of other domains.
pub struct Penalty {
    /// What its routers saw and said of them.
    pub drawn: Drawn,
    /// Weight of [`Drawn::add`].
    pub weight: f64,
}

/// A run and what it needs.
pub struct Run<'a> {
    pub trainee: &'a Trainee,
    pub goal: Goal<'a>,
    pub kept: Option<Kept>,
    pub penalty: Option<Penalty>,
    pub corpus: &'a Corpus<'a>,
    /// Documents to train on.
    pub documents: Vec<usize>,
    /// Text that is not trained on, in batches.
    pub held_out: Vec<Vec<Lesson>>,
    pub options: &'a Training,
    pub state: State,
    /// Where the state is kept.
    pub file: Option<PathBuf>,
    pub interrupt: &'a Interrupt,
}

impl Run<'_> {
    /// Steps in all.
    pub fn steps(&self) -> u64 {
        if let Some(steps) = self.options.steps {
            return steps;
        }
        let steps = |round| self.round(round).len().div_ceil(self.options.accumulate) as u64;
        (0..self.options.epochs).map(steps).sum()
    }

    fn round(&self, round: u64) -> Round {
        let order = shuffled(self.documents.clone(), self.options.seed, round);
        Round::new(self.corpus, order, self.options.batch_tokens)
    }

    /// Steps until the end, or until the loss on held-out text falls no more.
    ///
    /// # Errors
    /// [`FinetuneError`]: interruption, a number that is not finite; the state of the last good step is in its file then.
    pub fn go(&mut self, watcher: &mut dyn Watcher) -> Result<Stopped, FinetuneError> {
        let ended = self.steps_until_the_end(watcher);
        if let Some(file) = &self.file {
            match &ended {
                Ok(_) | Err(FinetuneError::Diverged { .. }) => self.state.save(file)?,
                Err(_) if self.interrupt.check().is_err() => self.state.save(file)?,
                Err(_) => {}
            }
        }
        ended
    }

    fn steps_until_the_end(&mut self, watcher: &mut dyn Watcher) -> Result<Stopped, FinetuneError> {
        let steps = self.steps();
        let every = match self.options.evaluate_every {
            0 => steps.div_ceil(10).max(1),
            n => n,
        };
        let mut round = self.round(self.state.round);
        let (mut saved, mut last) = (Instant::now(), None);
        loop {
            let step = self.state.step;
            let due = step.is_multiple_of(every) || step == steps;
            let known = self.state.evaluations.last().is_some_and(|e| e.step == step);
            if due && !known && !self.held_out.is_empty() {
                self.evaluate()?;
                self.save(&mut saved, Duration::ZERO)?;
            }
            let evaluation = self.state.evaluations.last().filter(|e| e.step == step);
            watcher.progress(&Progress { steps, done: step, step: last.as_ref(), evaluation });
            if step >= steps {
                return Ok(Stopped::Finished);
            }
            if self.options.patience > 0 && self.state.stale() >= self.options.patience {
                return Ok(Stopped::NoGain);
            }
            if self.state.batch >= round.len() {
                (self.state.round, self.state.batch) = (self.state.round + 1, 0);
                round = self.round(self.state.round);
            }
            last = Some(self.step(&round, steps)?);
            self.save(&mut saved, Duration::from_secs(SAVE_EVERY))?;
        }
    }

    fn save(&self, saved: &mut Instant, after: Duration) -> Result<(), FinetuneError> {
        if let Some(file) = self.file.as_deref().filter(|_| saved.elapsed() >= after) {
            self.state.save(file)?;
            *saved = Instant::now();
        }
        Ok(())
    }

    /// One step; the state changes only if all of it went well.
    fn step(&mut self, round: &Round, steps: u64) -> Result<StepRecord, FinetuneError> {
        let started = Instant::now();
        let from = self.state.batch;
        let to = round.len().min(from + self.options.accumulate);
        let batches = (from..to)
            .map(|b| round.batch(self.corpus, b))
            .collect::<Result<Vec<Vec<Lesson>>, _>>()?;
        let scored: usize = batches.iter().flatten().map(Lesson::scored).sum();
        let weight = 1.0 / scored.max(1) as f32;
        let (mut gradients, mut nats, mut tokens) = (FactorGradients::new(), 0.0, 0);
        let (mut visits, mut seen) = (0, 0);
        for (number, batch) in (from..).zip(&batches) {
            let lessons: Vec<&Lesson> = batch.iter().collect();
            let interrupt = self.interrupt;
            let stop = &mut || interrupt.check().is_err();
            self.state.factors.dropout = self.dropout(number);
            let found =
                self.trainee.gradient(&self.state.factors, &lessons, &self.goal, weight, stop);
            self.state.factors.dropout = None;
            let found = found.map_err(|e| self.failed(e))?;
            nats += found.nats;
            tokens += found.tokens;
            visits += found.visits.values().sum::<usize>();
            seen += found.visits.len() * found.tokens;
            optimise::accumulate(&mut gradients, found.factors);
        }
        self.keep(&mut gradients)?;
        if let Some(Penalty { drawn, weight }) = &self.penalty {
            drawn.add(&self.state.factors, *weight, &mut gradients);
        }
        let norm = optimise::norm(&gradients);
        if !norm.is_finite() {
            let what = "the gradient".into();
            return Err(self.failed(GradientError::NotFinite { what }));
        }
        let share = self.options.schedule.share(self.state.step, steps, self.options.warmup);
        let rate = self.options.learning_rate * share;
        let clip = self.options.clip;
        // As PyTorch's `clip_grad_norm_`.
        let scale = if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.state.step += 1;
        self.state.batch = to;
        let number = self.state.step;
        let State { factors, first, second, .. } = &mut self.state;
        let step = optimise::Step { number, rate, scale };
        let damping = self.kept.as_ref().map(|kept| &kept.damping);
        optimise::step(self.options.optimiser, step, damping, factors, &gradients, first, second);
        if self.held_out.is_empty() {
            self.state.best = self.state.factors.clone();
            self.state.best_step = number;
        }
        let record = StepRecord {
            step: number,
            epoch: self.state.round + 1,
            loss: nats / scored.max(1) as f64,
            gradient_norm: norm,
            learning_rate: rate,
            tokens: tokens as u64,
            coverage: if seen == 0 { 1.0 } else { visits as f64 / seen as f64 },
            tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64().max(1e-9),
        };
        self.state.steps.push(record);
        Ok(record)
    }

    /// What a batch of this round leaves out.
    fn dropout(&self, batch: usize) -> Option<Dropout> {
        let share = self.options.dropout as f32;
        let key = || random_key(self.options.seed, self.state.round, batch);
        (share > 0.0).then(|| Dropout { share, key: key() })
    }

    /// Adds what pulls the model back to what it said before.
    fn keep(&mut self, gradients: &mut FactorGradients) -> Result<(), FinetuneError> {
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let (interrupt, factors) = (self.interrupt, &self.state.factors);
        let stop = &mut || interrupt.check().is_err();
        let found = kept.gradient(self.state.step, factors, stop);
        optimise::accumulate(gradients, found.map_err(|e| self.failed(e))?);
        Ok(())
    }

    fn failed(&self, error: GradientError) -> FinetuneError {
        match FinetuneError::from(error) {
            FinetuneError::Diverged { what, .. } => {
                let (step, state) = (self.state.step + 1, self.file.clone());
                FinetuneError::Diverged { step, what, state }
            }
            other => other,
        }
    }

    /// The loss on held-out text with the factors now.
    fn evaluate(&mut self) -> Result<(), FinetuneError> {
        let factors = &self.state.factors;
        let found = look(self.trainee, Some(factors), &self.held_out, &self.goal, self.interrupt);
        let loss = found.map_err(|e| self.failed(e))?.loss;
        if !loss.is_finite() {
            let what = "the loss on held-out text".into();
            return Err(self.failed(GradientError::NotFinite { what }));
        }
        self.state.note(loss);
        Ok(())
    }
}

/// What a model makes of some text.
pub struct Look {
    /// Mean loss of the tokens that count, in nats.
    pub loss: f64,
    /// Share of the tokens that visit the expert, mean over layers; none without experts.
    pub visits: Option<f64>,
}

/// Looks at some text.
///
/// # Errors
/// [`GradientError`].
pub fn look(
    trainee: &Trainee,
    factors: Option<&Factors>,
    batches: &[Vec<Lesson>],
    goal: &Goal<'_>,
    interrupt: &Interrupt,
) -> Result<Look, GradientError> {
    let (mut sum, mut count, mut visits, mut chances) = (0.0, 0, 0, 0);
    for batch in batches {
        let lessons: Vec<&Lesson> = batch.iter().collect();
        let found = trainee.losses(factors, &lessons, goal, &mut || interrupt.check().is_err())?;
        sum += found.nats.iter().sum::<f64>();
        count += found.nats.len();
        visits += found.visits.values().sum::<usize>();
        chances += found.visits.len() * found.tokens;
    }
    let visits = (chances > 0).then(|| visits as f64 / chances as f64);
    Ok(Look { loss: sum / count.max(1) as f64, visits })
}

/// The state that `path` keeps, for messages.
///
/// # Errors
/// [`CheckpointError::Unsupported`] if it is there and was not asked for.
pub fn fresh(path: &Path) -> Result<(), CheckpointError> {
    match path.exists() {
        false => Ok(()),
        true => Err(CheckpointError::Unsupported {
            what: "an earlier run has left its state".into(),
            file: path.to_owned(),
            hint: "`--resume` goes on from it; delete it to begin anew".into(),
        }),
    }
}

//! The thread that owns the batch: prompts go through the model piece by piece, all answers together token by token.

mod choose;
mod lane;
mod runner;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use moe_merge_model::generate::EndOfText;
use tokio::sync::mpsc::UnboundedSender;

use crate::live::Generation;
use crate::metrics::Metrics;
use crate::options::Limits;

pub use choose::{Choosing, Logprobs};

/// What one prompt is to be answered with.
#[derive(Debug)]
pub struct Job {
    /// The generation that answers.
    pub generation: Arc<Generation>,
    /// The prompt, one token at least, shorter than the context.
    pub prompt: Vec<u32>,
    /// Numbers of its answers: this one, and so many.
    pub choices: (usize, usize),
    /// Tokens of an answer at most.
    pub most: usize,
    /// How tokens are chosen.
    pub choosing: Choosing,
    /// What tokens do that end a text.
    pub end_of_text: EndOfText,
    /// Whether the experts that each token visits are told at the end.
    pub follow: Follow,
    /// Where events go, each with the number of its answer; nobody there: nobody needs the answers.
    pub out: UnboundedSender<(usize, Event)>,
    /// For every answer of the request whether its reader has enough.
    pub enough: Arc<[AtomicBool]>,
    /// When the request came, and when it has to be answered.
    pub began: Instant,
    pub deadline: Instant,
    /// Its places among the answers that the engine takes.
    pub places: Places,
}

/// Places among the answers that the engine takes; given back when dropped.
#[derive(Debug, Default)]
pub struct Places {
    count: usize,
    taken: Arc<AtomicUsize>,
}

impl Drop for Places {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.count, Relaxed);
    }
}

/// Whether the experts that each token visits are told at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// They are.
    Tokens,
    /// They are only counted.
    No,
}

/// What happens to an answer.
#[derive(Debug)]
pub enum Event {
    /// It has one more token.
    Token(u32, Option<Logprobs>),
    /// It is complete.
    End(Finish, Vec<LayerVisits>),
    /// It cannot be completed.
    Failed(Failure),
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// It has as many tokens as it may have.
    Length,
}

/// Why an answer cannot be completed.
#[derive(Debug)]
pub enum Failure {
    /// It took too long.
    Late,
    /// The model failed, and said this.
    Model(String),
    /// The server has a mistake.
    Mistake,
}

/// Which experts the tokens of a sequence visited in one layer, prompt and answer in order.
#[derive(Debug, Clone)]
pub struct LayerVisits {
    /// The layer.
    pub layer: usize,
    /// Experts that a token visits.
    pub top_k: usize,
    /// `[tokens, top_k]`, best first.
    pub ids: Vec<u32>,
    /// `[tokens, top_k]`.
    pub weights: Vec<f32>,
}

/// Why a job is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Too many wait already.
    Full,
    /// The engine has stopped.
    Stopped,
}

/// The thread, seen from outside. It ends when nothing is left to do after [`Engine::close`].
#[derive(Debug)]
pub struct Engine {
    jobs: Mutex<Option<Sender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    metrics: Arc<Metrics>,
    /// Answers under way or waiting, and the most there may be.
    taken: Arc<AtomicUsize>,
    most: usize,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the system says if it gives no thread.
    pub fn start(limits: &Limits, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let (sender, receiver) = channel();
        let runner = runner::Runner::new(receiver, limits, metrics.clone());
        let thread =
            std::thread::Builder::new().name("engine".into()).spawn(move || runner.run())?;
        Ok(Self {
            jobs: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
            metrics,
            taken: Arc::default(),
            most: limits.sequences.saturating_add(limits.waiting),
        })
    }

    /// Gives the thread jobs, all of them or none.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), Refused> {
        let guard = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = guard.as_ref().ok_or(Refused::Stopped)?;
        let count: usize = jobs.iter().map(|job| job.choices.1).sum();
        // Under the lock nobody else adds to it.
        if self.taken.load(Relaxed) + count > self.most {
            return Err(Refused::Full);
        }
        for mut job in jobs {
            let count = job.choices.1;
            self.taken.fetch_add(count, Relaxed);
            job.places = Places { count, taken: self.taken.clone() };
            self.metrics.waiting.fetch_add(count, Relaxed);
            if sender.send(job).is_err() {
                self.metrics.waiting.fetch_sub(count, Relaxed);
                return Err(Refused::Stopped);
            }
        }
        Ok(())
    }

    /// Takes no more jobs; waits until those it has are done.
    pub fn close(&self) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // It catches its own panics.
            let _ = thread.join();
        }
    }
}

//! Sequences under way.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use moe_merge_model::generate::EndOfText;
use moe_merge_model::{Cache, TextError, Visited};

use super::choose::Chooser;
use super::{Event, Failure, Finish, Follow, Job, LayerVisits};
use crate::metrics::Metrics;

/// A prompt on its way through the model.
pub struct Prompt {
    pub job: Arc<Job>,
    pub cache: Cache,
    pub trail: Trail,
}

/// An answer that is being written.
pub struct Lane {
    pub job: Arc<Job>,
    /// Its number in the request.
    pub number: usize,
    pub cache: Cache,
    /// The token that goes through the model next.
    pub next: u32,
    pub trail: Trail,
    chooser: Chooser,
    /// Tokens it has.
    count: usize,
    /// When it got the last one.
    last: Instant,
}

/// What a reader wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// More tokens.
    More,
    /// No more: a stop text was found.
    Enough,
    /// Nothing: it is gone.
    Nothing,
}

/// Where the tokens of a sequence went, if somebody asked.
#[derive(Debug, Clone)]
pub struct Trail(Option<Vec<LayerVisits>>);

impl Trail {
    /// An empty one.
    pub fn new(follow: Follow) -> Self {
        Self((follow == Follow::Tokens).then(Vec::new))
    }

    /// Adds rows of what a router did.
    pub fn add(&mut self, visited: &Visited<'_>, rows: std::ops::Range<usize>) {
        let Some(layers) = &mut self.0 else { return };
        let top_k = visited.routing.top_k;
        let at = layers.iter().position(|l| l.layer == visited.layer).unwrap_or_else(|| {
            let (ids, weights) = (Vec::new(), Vec::new());
            layers.push(LayerVisits { layer: visited.layer, top_k, ids, weights });
            layers.len() - 1
        });
        let slots = rows.start * top_k..rows.end * top_k;
        layers[at].ids.extend_from_slice(&visited.routing.ids[slots.clone()]);
        layers[at].weights.extend_from_slice(&visited.routing.weights[slots]);
    }
}

impl Job {
    /// Tells the reader of answer `number`; whether anybody listens shows in [`Job::wanted`].
    pub fn tell(&self, number: usize, event: Event) {
        let _ = self.out.send((number, event));
    }

    /// What the reader of its answers wants.
    pub fn wanted(&self) -> Wanted {
        if self.out.is_closed() { Wanted::Nothing } else { Wanted::More }
    }

    /// Ends all its answers.
    pub fn fail(&self, failure: impl Fn() -> Failure) {
        let (first, count) = self.choices;
        (first..first + count).for_each(|number| self.tell(number, Event::Failed(failure())));
    }
}

impl Prompt {
    /// Its answers, each with its first token, from the logits after it. Those that are complete by then are not among them.
    pub fn answers(self, logits: &[f32], metrics: &Metrics) -> Vec<Lane> {
        let (first, count) = self.job.choices;
        let mut lanes = Vec::with_capacity(count);
        // The last one takes the keys and values, the others copies.
        let mut caches: Vec<Cache> = (1..count).map(|_| self.cache.clone()).collect();
        caches.push(self.cache);
        for (i, cache) in caches.into_iter().enumerate() {
            let (job, number, trail) = (self.job.clone(), first + i, self.trail.clone());
            let chooser = match Chooser::new(&job.choosing, i) {
                Ok(chooser) => chooser,
                Err(e) => {
                    job.tell(number, Event::Failed(Failure::Model(e.to_string())));
                    continue;
                }
            };
            let last = job.began;
            let mut lane = Lane { job, number, cache, next: 0, trail, chooser, count: 0, last };
            if lane.take(logits, metrics) {
                lanes.push(lane);
            }
        }
        lanes
    }
}

impl Lane {
    /// What its reader wants.
    pub fn wanted(&self) -> Wanted {
        match self.job.enough[self.number].load(Relaxed) {
            true => Wanted::Enough,
            false => self.job.wanted(),
        }
    }

    /// Tells that it cannot be completed.
    pub fn fail(&self, failure: Failure) {
        self.job.tell(self.number, Event::Failed(failure));
    }

    /// Chooses the next token from the logits after the last one and tells it; whether the answer goes on.
    pub fn take(&mut self, logits: &[f32], metrics: &Metrics) -> bool {
        if self.is_full() {
            self.end(Finish::Length, metrics);
            return false;
        }
        let (token, logprobs) = match self.chooser.next(logits) {
            Ok(chosen) => chosen,
            Err(e) => {
                self.failed(e, metrics);
                return false;
            }
        };
        let now = Instant::now();
        let (times, since) = match self.count {
            0 => (&metrics.first_token, self.job.began),
            _ => (&metrics.next_token, self.last),
        };
        times.add(now.duration_since(since));
        self.last = now;
        let ends = self.job.generation.tokenizer.eos_ids().contains(&token);
        if ends && self.job.end_of_text == EndOfText::Stop {
            self.end(Finish::Stop, metrics);
            return false;
        }
        self.count += 1;
        self.next = token;
        metrics.new_tokens.fetch_add(1, Relaxed);
        self.job.tell(self.number, Event::Token(token, logprobs));
        if self.is_full() {
            self.end(Finish::Length, metrics);
            return false;
        }
        true
    }

    /// Whether it may have no more tokens, by what was asked for or by the context.
    fn is_full(&self) -> bool {
        let tokens = self.job.prompt.len() + self.count;
        self.count == self.job.most || tokens >= self.job.generation.model.spec().max_positions
    }

    fn end(&mut self, finish: Finish, metrics: &Metrics) {
        metrics.answer.add(self.job.began.elapsed());
        let visits = self.trail.0.take().unwrap_or_default();
        self.job.tell(self.number, Event::End(finish, visits));
    }

    fn failed(&self, error: TextError, metrics: &Metrics) {
        metrics.failed.fetch_add(1, Relaxed);
        self.fail(Failure::Model(error.to_string()));
    }
}

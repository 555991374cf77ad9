//! What the thread does, round after round.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use moe_merge_model::{Cache, LogitRows, Spec, Visited};

use super::lane::{Lane, Prompt, Trail, Wanted};
use super::{Failure, Job};
use crate::live::Generation;
use crate::metrics::Metrics;
use crate::options::Limits;

/// Prompt tokens of a round where answers wait for their next token, and where none does. What a token gets does not
/// depend on it.
const PIECE: usize = 64;
const PIECE_ALONE: usize = 512;

/// The state of the thread.
pub struct Runner {
    jobs: Receiver<Job>,
    waiting: VecDeque<Job>,
    prompts: VecDeque<Prompt>,
    lanes: Vec<Lane>,
    sequences: usize,
    cache_bytes: usize,
    metrics: Arc<Metrics>,
}

impl Runner {
    pub fn new(jobs: Receiver<Job>, limits: &Limits, metrics: Arc<Metrics>) -> Self {
        Self {
            jobs,
            waiting: VecDeque::new(),
            prompts: VecDeque::new(),
            lanes: Vec::new(),
            sequences: limits.sequences,
            cache_bytes: limits.cache_bytes,
            metrics,
        }
    }

    /// Works until nothing is left to do and nobody can send more.
    pub fn run(mut self) {
        while self.receive() {
            // A mistake of ours must not take those down with it who come later.
            if catch_unwind(AssertUnwindSafe(|| self.round())).is_err() {
                tracing::error!("a round of the engine panicked");
                self.give_up();
            }
            self.tell_sizes();
        }
    }

    /// Takes what was sent; waits where there is nothing else to do. False: the end.
    fn receive(&mut self) -> bool {
        let idle = self.waiting.is_empty() && self.prompts.is_empty() && self.lanes.is_empty();
        if idle {
            match self.jobs.recv() {
                Ok(job) => self.waiting.push_back(job),
                Err(_) => return false,
            }
        }
        loop {
            match self.jobs.try_recv() {
                Ok(job) => self.waiting.push_back(job),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
            }
        }
    }

    fn round(&mut self) {
        self.let_go();
        self.admit();
        self.read();
        self.write();
    }

    /// Lets go of what nobody waits for any more, or what took too long.
    fn let_go(&mut self) {
        let (now, metrics) = (Instant::now(), self.metrics.clone());
        let keep = |wanted: Wanted, job: &Job, late: &dyn Fn()| match wanted {
            Wanted::Nothing => {
                metrics.cancelled.fetch_add(1, Relaxed);
                false
            }
            Wanted::Enough => {
                metrics.answer.add(now.duration_since(job.began));
                false
            }
            Wanted::More if now >= job.deadline => {
                late();
                false
            }
            Wanted::More => true,
        };
        self.waiting.retain(|job| {
            let kept = keep(job.wanted(), job, &|| job.fail(|| Failure::Late));
            if !kept {
                metrics.waiting.fetch_sub(job.choices.1, Relaxed);
            }
            kept
        });
        self.prompts.retain(|p| keep(p.job.wanted(), &p.job, &|| p.job.fail(|| Failure::Late)));
        self.lanes.retain(|l| keep(l.wanted(), &l.job, &|| l.fail(Failure::Late)));
    }

    /// Takes waiting jobs as long as there is room for their sequences; first come, first served.
    fn admit(&mut self) {
        while let Some(job) = self.waiting.front() {
            let count = self.count();
            let bytes = job.choices.1 * cache_bytes(job);
            let room = count + job.choices.1 <= self.sequences
                && self.bytes().saturating_add(bytes) <= self.cache_bytes;
            if !room && count > 0 {
                return;
            }
            let Some(job) = self.waiting.pop_front() else { return };
            self.metrics.waiting.fetch_sub(job.choices.1, Relaxed);
            let job = Arc::new(job);
            let cache = Cache::new(job.generation.model.model(), capacity(&job));
            let trail = Trail::new(job.follow);
            self.prompts.push_back(Prompt { job, cache, trail });
        }
    }

    /// Sequences, and those that prompts will become.
    fn count(&self) -> usize {
        self.lanes.len() + self.prompts.iter().map(|p| p.job.choices.1).sum::<usize>()
    }

    /// Bytes of their keys and values.
    fn bytes(&self) -> usize {
        let prompts = self.prompts.iter().map(|p| p.job.choices.1 * cache_bytes(&p.job));
        prompts.chain(self.lanes.iter().map(|l| cache_bytes(&l.job))).sum()
    }

    /// A piece of the prompt that came first.
    fn read(&mut self) {
        let Some(prompt) = self.prompts.front_mut() else { return };
        let done = prompt.cache.len();
        let piece = if self.lanes.is_empty() { PIECE_ALONE } else { PIECE };
        let end = prompt.job.prompt.len().min(done + piece);
        let rows = if end == prompt.job.prompt.len() { LogitRows::Last } else { LogitRows::Skip };
        let Prompt { job, cache, trail } = prompt;
        let generation = &job.generation;
        let mut watch = |visited: Visited<'_>| {
            generation.routers.add(&visited);
            trail.add(&visited, 0..visited.routing.tokens);
        };
        let passed = generation.model.prompt(&job.prompt[done..end], cache, rows, Some(&mut watch));
        self.metrics.prompt_tokens.fetch_add((end - done) as u64, Relaxed);
        let logits = match passed {
            Ok(_) if end < job.prompt.len() => return,
            Ok(logits) => Ok(logits),
            Err(e) => Err(e.to_string()),
        };
        let Some(prompt) = self.prompts.pop_front() else { return };
        match logits {
            Ok(logits) => self.lanes.extend(prompt.answers(&logits, &self.metrics)),
            Err(e) => {
                self.metrics.failed.fetch_add(prompt.job.choices.1 as u64, Relaxed);
                tracing::warn!("a prompt failed: {e}");
                prompt.job.fail(|| Failure::Model(e.clone()));
            }
        }
    }

    /// One more token for every answer; those of a generation go through it together.
    fn write(&mut self) {
        let mut generations: Vec<Arc<Generation>> = Vec::new();
        for lane in &self.lanes {
            if !generations.iter().any(|g| Arc::ptr_eq(g, &lane.job.generation)) {
                generations.push(lane.job.generation.clone());
            }
        }
        for generation in generations {
            let (mut own, others): (Vec<Lane>, Vec<Lane>) = std::mem::take(&mut self.lanes)
                .into_iter()
                .partition(|lane| Arc::ptr_eq(&lane.job.generation, &generation));
            self.lanes = others;
            if let Err(e) = step(&generation, &mut own, &self.metrics) {
                tracing::warn!("a batch failed: {e}");
                // One of them only may be to blame.
                own = own
                    .into_iter()
                    .filter_map(|lane| {
                        let mut one = vec![lane];
                        match step(&generation, &mut one, &self.metrics) {
                            Ok(()) => one.pop(),
                            Err(e) => {
                                self.metrics.failed.fetch_add(1, Relaxed);
                                one.iter().for_each(|l| l.fail(Failure::Model(e.clone())));
                                None
                            }
                        }
                    })
                    .collect();
            }
            self.lanes.append(&mut own);
        }
    }

    /// Ends everything under way.
    fn give_up(&mut self) {
        self.prompts.drain(..).for_each(|p| p.job.fail(|| Failure::Mistake));
        self.lanes.drain(..).for_each(|lane| lane.fail(Failure::Mistake));
    }

    fn tell_sizes(&self) {
        self.metrics.running.store(self.count(), Relaxed);
        self.metrics.cache_bytes.store(self.bytes(), Relaxed);
    }
}

/// One token of every lane through the model, and the next one chosen; lanes that end leave.
fn step(generation: &Generation, lanes: &mut Vec<Lane>, metrics: &Metrics) -> Result<(), String> {
    let tokens: Vec<u32> = lanes.iter().map(|lane| lane.next).collect();
    let (mut caches, mut trails) = (Vec::new(), Vec::new());
    for Lane { cache, trail, .. } in lanes.iter_mut() {
        caches.push(cache);
        trails.push(trail);
    }
    let mut watch = |visited: Visited<'_>| {
        generation.routers.add(&visited);
        trails.iter_mut().enumerate().for_each(|(row, trail)| trail.add(&visited, row..row + 1));
    };
    let logits = generation.model.next(&tokens, &mut caches, Some(&mut watch));
    let logits = logits.map_err(|e| e.to_string())?;
    let mut rows = logits.chunks_exact(generation.model.spec().vocab);
    lanes.retain_mut(|lane| rows.next().is_some_and(|row| lane.take(row, metrics)));
    Ok(())
}

/// Tokens that a sequence of the job may come to have.
fn capacity(job: &Job) -> usize {
    let most = job.generation.model.spec().max_positions;
    job.prompt.len().saturating_add(job.most).min(most)
}

/// Bytes of keys and values of one sequence of the job.
fn cache_bytes(job: &Job) -> usize {
    token_bytes(job.generation.model.spec()).saturating_mul(capacity(job))
}

/// Bytes of keys and values of one token, as f32.
fn token_bytes(spec: &Spec) -> usize {
    let a = &spec.attention;
    size_of::<f32>() * a.kv_heads * (a.qk_dim() + a.v_dim()) * spec.layers.len()
}

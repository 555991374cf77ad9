//! What every change of a model's experts reports.

use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::generation::Generation;
use moe_merge_checkpoint::manifest::FileRecord;
use moe_merge_checkpoint::{Change, Interrupt};
use serde::Serialize;

use crate::effect::{Effect, Watched};
use crate::error::AdaptError;
use crate::moe::Moe;
use crate::proposal::{ProposalReport, effect};

/// What every change of a model's experts does, or did.
#[derive(Debug, Clone, Serialize)]
pub struct ChangeReport {
    /// The folder.
    pub folder: PathBuf,
    /// The generation that is live now; none if nothing was written.
    pub generation: Option<u32>,
    /// The generation before.
    pub parent: u32,
    /// Number of the expert.
    pub expert: usize,
    /// Its name: what it has now or, if it is gone, had.
    pub name: String,
    /// Bytes of new shards and index; 0 if nothing was written.
    pub bytes_written: u64,
    /// What it does to text, where that was asked for and there is text.
    pub effect: Option<Effect>,
    /// The generation that it would become, if it waits for approval: then nothing is live yet.
    pub staged: Option<u32>,
    /// Limits of the folder's settings that it breaks.
    pub refused: Vec<String>,
    /// Files that are new, the index among them.
    pub added: Vec<FileRecord>,
    /// Where the time went.
    pub seconds: Seconds,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Where the time of a change went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// Opening, checking, comparing.
    pub prepare: f64,
    /// Fitting routers.
    pub calibrate: f64,
    /// Running text through both models.
    pub forecast: f64,
    /// Writing and switching.
    pub write: f64,
}

/// Whether the effect of a change on text is measured before it is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Forecast {
    /// It is not.
    #[default]
    None,
    /// On the evaluation text of the folder's settings, else on the prompts of the recipe in the folder, if there are any.
    Stored,
    /// On the prompts of all experts in this file, as `calibrate` takes it.
    Prompts(PathBuf),
}

impl ChangeReport {
    /// Of a change that has not been looked at yet.
    pub(crate) fn new(moe: &Moe, expert: usize, name: String) -> Self {
        Self {
            folder: moe.source.path.clone(),
            generation: None,
            parent: moe.generation(),
            expert,
            name,
            bytes_written: 0,
            effect: None,
            staged: None,
            refused: Vec::new(),
            added: Vec::new(),
            seconds: Seconds::default(),
            warnings: moe.source.notes.clone(),
        }
    }

    /// Measures what `change` does to text.
    ///
    /// # Errors
    /// Text that cannot be read; what running the models meets.
    pub(crate) fn forecast(
        &mut self,
        moe: &Moe,
        change: &Change<'_>,
        watched: Watched,
        forecast: &Forecast,
        interrupt: &Interrupt,
    ) -> Result<(), AdaptError> {
        let prompts: Option<&Path> = match forecast {
            Forecast::None => return Ok(()),
            Forecast::Stored => None,
            Forecast::Prompts(file) => Some(file),
        };
        let (effect, notes) = effect(moe, change, watched, prompts, interrupt)?;
        self.warnings.extend(notes);
        self.seconds.forecast = effect.as_ref().map_or(0.0, |e| e.seconds);
        self.effect = effect;
        Ok(())
    }

    /// It is live, and was begun to be written at `clock`.
    pub(crate) fn made(&mut self, made: Generation, clock: Instant) {
        self.generation = Some(made.number);
        self.parent = made.parent;
        self.bytes_written = made.bytes_written;
        self.added = made.added;
        self.warnings.extend(made.notes);
        self.seconds.write = clock.elapsed().as_secs_f64();
    }

    /// It waits for approval.
    pub(crate) fn waits(&mut self, staged: ProposalReport) {
        self.staged = Some(staged.generation);
        self.refused = staged.refused;
        self.bytes_written = staged.bytes_written;
        self.warnings.extend(staged.warnings);
        self.seconds.write = staged.seconds;
    }
}

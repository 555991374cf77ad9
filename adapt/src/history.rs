//! What was done to a model, and how to take it back.

use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::generation::{self, Pruned};
use moe_merge_checkpoint::manifest::{FileRecord, Manifest};
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Interrupt, JournalLine};
use serde::Serialize;

use crate::error::AdaptError;
use crate::proposal::proposals;

/// The generations of a model.
#[derive(Debug, Clone, Serialize)]
pub struct History {
    /// The folder.
    pub folder: PathBuf,
    /// The generation that loaders see; none for a model that this program has neither written nor changed.
    pub live: Option<u32>,
    /// First to last.
    pub generations: Vec<Entry>,
    /// Changes that wait for approval.
    pub staged: Vec<Waiting>,
}

/// A change that waits for approval.
#[derive(Debug, Clone, Serialize)]
pub struct Waiting {
    /// The generation that it would become.
    pub generation: u32,
    /// `swap`, `add`, `drop`.
    pub action: String,
    /// Why.
    pub message: Option<String>,
    /// Who staged it.
    pub user: Option<String>,
    /// Whether the model was changed since.
    pub outdated: bool,
}

/// One generation.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// What the journal says.
    #[serde(flatten)]
    pub line: JournalLine,
    /// Whether all of its files are still there.
    pub restorable: bool,
    /// The generation whose files it has, if it is a rollback.
    pub same_as: Option<u32>,
}

/// Reads the journal. A change whose process was killed is finished or undone first, where that may be.
///
/// # Errors
/// A folder that is not there, a journal or manifest that is broken.
pub fn history(folder: &Path) -> Result<History, AdaptError> {
    let _ = generation::recover(folder);
    let live = Manifest::load(folder)?.map(|m| m.generation);
    let lines = generation::history(folder)?;
    let generations = lines
        .into_iter()
        .map(|line| Entry {
            restorable: generation::manifest(folder, line.generation).is_ok(),
            same_as: line.details["to"]
                .as_u64()
                .filter(|_| line.action == "rollback")
                .and_then(|to| u32::try_from(to).ok()),
            line,
        })
        .collect();
    let waiting = proposals(folder)?.into_iter().map(|p| Waiting {
        generation: p.generation,
        action: p.action,
        message: p.message,
        user: p.user,
        outdated: p.parent != live.unwrap_or(0),
    });
    Ok(History { folder: folder.to_owned(), live, generations, staged: waiting.collect() })
}

/// Forgets the files of all but the live generation and the `keep` before it.
///
/// # Errors
/// As [`generation::prune`].
pub fn prune(folder: &Path, keep: usize) -> Result<Pruned, AdaptError> {
    Ok(generation::prune(folder, keep)?)
}

/// What a rollback did.
#[derive(Debug, Clone, Serialize)]
pub struct RollbackReport {
    /// The folder.
    pub folder: PathBuf,
    /// The generation that is live now.
    pub generation: u32,
    /// The generation before.
    pub parent: u32,
    /// The generation whose files it has.
    pub to: u32,
    /// Files that came back, the index among them.
    pub added: Vec<FileRecord>,
    /// Files that went to the store.
    pub removed: Vec<FileRecord>,
    /// Seconds in all.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Makes the next generation of the files of an earlier one; without `to`, takes the last change back.
///
/// # Errors
/// As [`generation::rollback`]; then the model is as before.
pub fn rollback(
    folder: &Path,
    to: Option<u32>,
    message: Option<&str>,
    interrupt: &Interrupt,
) -> Result<RollbackReport, AdaptError> {
    let clock = Instant::now();
    let watch = Watch { interrupt, progress: &|_| {} };
    let made = generation::rollback(folder, to, message, watch)?;
    let lines = generation::history(folder)?;
    let line = lines.iter().find(|l| l.generation == made.number);
    let to = line.and_then(|l| l.details["to"].as_u64()).and_then(|to| u32::try_from(to).ok());
    Ok(RollbackReport {
        folder: folder.to_owned(),
        generation: made.number,
        parent: made.parent,
        to: to.unwrap_or_default(),
        added: made.added,
        removed: made.removed,
        seconds: clock.elapsed().as_secs_f64(),
        warnings: made.notes,
    })
}

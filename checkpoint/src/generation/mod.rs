//! Changes to a model folder, each a generation: new shards beside the old ones, a new index, a line in the journal.
//!
//! [`commit`] writes the tensors that changed into new shards and replaces `model.safetensors.index.json` in one
//! step: a loader sees the old model or the new one. It works on every folder with safetensors, also one that
//! another program wrote; of such a folder the first change records what was found as generation 0. Shards that a
//! generation no longer needs move to `.moe-merge/store`, named by their hash.
//!
//! A change may also give the model a new `config.json`, and tensors that it had not: another number of experts. Both
//! change in the same step for what this crate opens.
//!
//! [`rollback`] makes the next generation of the files of an earlier one; [`open`] opens an earlier one without making
//! it live; [`prune`] forgets those that are not to come back.
//!
//! A shard of another program may hold tensors that are replaced beside tensors that stay. Its bytes are not
//! touched; the new shard has a name that comes after it, and loaders keep the value they saw last.

mod change;
mod check;
mod current;
pub(crate) mod journal;
mod lock;
mod name;
mod old;
mod prune;
mod settings;
mod shards;
mod stage;
mod state;
pub(crate) mod switch;

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::error::CheckpointError;
use crate::manifest::{FileRecord, SourceRecord};
use crate::weight::WeightRef;
use crate::write::Watch;
use lock::Lock;

pub use check::{Checked, check};
pub use current::{Current, current, is_replaced, open};
pub use journal::{JOURNAL_NAME, JournalLine, history};
pub use old::{before, manifest, open_old};
pub use prune::Pruned;
pub use settings::{Approval, SETTINGS_NAME, Settings, Thresholds};

/// The model's configuration, seen from its folder.
pub(crate) const CONFIG: &str = "config.json";

/// New values of tensors that belong into one file.
#[derive(Debug, Clone)]
pub struct NewTensors {
    /// What they are, as part of the file's name: `router`, `expert-03`.
    pub role: String,
    /// Names as [`crate::Source::tensors`] has them, and the new values, in any dtype: they are stored in the dtype of
    /// the old ones, new tensors in their own.
    pub tensors: Vec<(String, WeightRef)>,
}

/// What to change, and what the journal says about it.
#[derive(Debug, Clone, Default)]
pub struct Change<'a> {
    /// `calibrate`, `swap`, ….
    pub action: &'a str,
    /// Why, in the words of a person.
    pub message: Option<&'a str>,
    /// Tensors that the model has, with new values of the same shapes. With a new `config`, tensors may be new, or have
    /// other shapes.
    pub tensors: Vec<NewTensors>,
    /// Tensors that go. One of them that is among `tensors` too comes back under its name in the hub layout.
    pub remove: Vec<String>,
    /// The new `config.json`, if it changes.
    pub config: Option<Map<String, Value>>,
    /// Names of the experts in order, if they change.
    pub experts: Option<Vec<String>>,
    /// What the model is made of, if that changes.
    pub sources: Option<Vec<SourceRecord>>,
    /// Parameters and measured effect.
    pub details: Value,
    /// How the routers are made now, if that changes.
    pub gate_mode: Option<String>,
    /// The generation that the new values were made for; if the folder is at another one by now, nothing is changed.
    pub parent: Option<u32>,
    /// Whether somebody approved it, where the folder's [`Settings`] ask for that.
    pub approved: bool,
}

/// A generation that is live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// Its number.
    pub number: u32,
    /// The one before.
    pub parent: u32,
    /// Files that were written or got another name; the index is among them.
    pub added: Vec<FileRecord>,
    /// Files that went to the store, and the old index.
    pub removed: Vec<FileRecord>,
    /// Bytes of new shards and index.
    pub bytes_written: u64,
    /// Names of the replaced tensors in their files.
    pub tensors: Vec<String>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// How long a writer waits for another one.
const PATIENCE: Duration = Duration::from_secs(2);

/// Makes the next generation of the model in `folder`.
///
/// Whatever happens, also a kill or a full disk, the folder holds the old generation or the new one. What a killed
/// process leaves is finished or undone by the next change or by [`recover`].
///
/// # Errors
/// * [`CheckpointError::MissingTensor`], [`CheckpointError::Shape`]: a tensor that the model has not, or not so
/// * [`CheckpointError::Unsupported`]: a part of a fused tensor, a link in place of a file, a folder of the Hub cache
/// * [`CheckpointError::Busy`] if another process changes the model, [`CheckpointError::Outdated`] if one did since
///   `change.parent`
/// * [`CheckpointError::ApprovalRequired`] if the folder's settings ask for approval and `change` has none
/// * [`CheckpointError::Malformed`] if the index is not the one of the last generation
/// * [`CheckpointError::NoRoom`], [`CheckpointError::Io`], [`CheckpointError::Interrupted`], and what computing the new
///   values meets
pub fn commit(
    folder: &Path,
    change: &Change<'_>,
    watch: Watch<'_>,
) -> Result<Generation, CheckpointError> {
    let folder = state::changeable(folder)?;
    Settings::allow(&folder, change.approved)?;
    let _lock = Lock::take(&folder, PATIENCE)?;
    switch::recover(&folder)?;
    let made = change::make(&folder, change, watch);
    if made.is_err() {
        switch::abandon(&folder)?;
    }
    made
}

/// Makes the next generation of the files of an earlier one, byte for byte; without `to`, of the one that [`before`]
/// tells. Nothing is lost: the generation that was live can come back in the same way.
///
/// A model whose shards had no index gets one that names them.
///
/// # Errors
/// * [`CheckpointError::NoGeneration`]
/// * [`CheckpointError::Malformed`] if a file of that generation was removed or damaged, or the history is broken
/// * as [`commit`] for the rest
pub fn rollback(
    folder: &Path,
    to: Option<u32>,
    message: Option<&str>,
    watch: Watch<'_>,
) -> Result<Generation, CheckpointError> {
    let folder = state::changeable(folder)?;
    let _lock = Lock::take(&folder, PATIENCE)?;
    switch::recover(&folder)?;
    let made = old::go_back(&folder, to, message, watch);
    if made.is_err() {
        switch::abandon(&folder)?;
    }
    made
}

/// Removes the shards that neither the live generation nor the `keep` before it need. The journal stays.
///
/// # Errors
/// [`CheckpointError::Io`], [`CheckpointError::Busy`], and a broken history.
pub fn prune(folder: &Path, keep: usize) -> Result<Pruned, CheckpointError> {
    let folder = state::changeable(folder)?;
    let _lock = Lock::take(&folder, PATIENCE)?;
    switch::recover(&folder)?;
    prune::prune(&folder, keep)
}

/// Finishes or undoes a change whose process was killed half way; `false` if there is none, or if its process lives.
///
/// # Errors
/// [`CheckpointError::Io`], [`CheckpointError::Malformed`].
pub fn recover(folder: &Path) -> Result<bool, CheckpointError> {
    if !switch::is_unfinished(folder) {
        return Ok(false);
    }
    match Lock::take(folder, Duration::ZERO) {
        Ok(_lock) => switch::recover(folder).map(|()| true),
        Err(CheckpointError::Busy { .. }) => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests;

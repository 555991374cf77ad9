//! Whether the history of a model is whole.

use std::collections::BTreeSet;
use std::path::Path;

use super::journal::{history, kept};
use super::switch::{STORE, View, blob};
use crate::error::CheckpointError;
use crate::manifest::{FileRecord, Problem, hash_files};
use crate::publish::Interrupt;

/// What a look at the history found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Generations in the journal.
    pub generations: usize,
    /// The journal was changed, or a shard of an older generation was.
    pub problems: Vec<Problem>,
    /// Generations that can no longer be gone back to.
    pub notes: Vec<String>,
}

/// Checks the chain of the journal and the shards of older generations.
///
/// # Errors
/// [`CheckpointError::Io`], [`CheckpointError::Interrupted`]; what is wrong is the result, not an error.
pub fn check(folder: &Path, interrupt: &Interrupt) -> Result<Checked, CheckpointError> {
    let mut checked = Checked::default();
    let lines = match history(folder) {
        Ok(lines) => lines,
        Err(CheckpointError::Malformed { what, file, expected, found, .. }) => {
            let file = file.strip_prefix(folder).unwrap_or(&file).display().to_string();
            checked.problems.push(Problem::History { file, what, expected, found });
            return Ok(checked);
        }
        Err(e) => return Err(e),
    };
    checked.generations = lines.len();
    let view = View::of(folder)?;
    let mut seen = BTreeSet::new();
    for line in &lines {
        for file in &line.removed {
            let small = kept(&file.name, line.parent.unwrap_or_default());
            let (stored, name) = match &small {
                Some(small) => view.find(small),
                None => {
                    let name = format!("{STORE}/{}.safetensors", file.blake3);
                    (blob(folder, &file.blake3), name)
                }
            };
            if !seen.insert(name.clone()) {
                continue;
            }
            if !stored.exists() {
                // A shard that only got another name, or came back, still lies in the model folder.
                let here = |f: &FileRecord| {
                    f.blake3 == file.blake3 && small.is_none() && folder.join(&f.name).exists()
                };
                if !here(file) && !lines.iter().flat_map(|l| &l.added).any(here) {
                    checked.notes.push(format!(
                        "`{name}` is gone (`{}` until generation {}): older generations cannot come back",
                        file.name, line.generation
                    ));
                }
                continue;
            }
            let found = hash_files(std::slice::from_ref(&stored), interrupt)?;
            if let Some(found) = found.get(&stored).filter(|found| found.blake3 != file.blake3) {
                checked.problems.push(Problem::Hash {
                    file: name,
                    expected: file.blake3.clone(),
                    found: found.blake3.clone(),
                });
            }
        }
    }
    Ok(checked)
}

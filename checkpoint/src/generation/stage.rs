//! The small files of the next generation, and the step from the staging folder to live.

use std::fs;
use std::path::Path;

use super::journal::{self, JOURNAL_NAME, JournalLine};
use super::state::State;
use super::switch::{NOTE, Pending, STAGING, sync_all};
use super::{CONFIG, Generation};
use crate::error::CheckpointError;
use crate::manifest::{MANIFEST_NAME, Manifest, hash_bytes};
use crate::publish::Interrupt;
use crate::write::{INDEX_NAME, write_file};

/// A generation whose shards are in the staging folder.
pub(super) struct Staged {
    pub pending: Pending,
    pub manifest: Manifest,
    /// The new index; none for a model that is one file again.
    pub index: Option<String>,
    /// The new `config.json`, if it changes.
    pub config: Option<String>,
    /// What the journal says; generation, hashes, time and user are filled in here.
    pub line: JournalLine,
}

impl Staged {
    /// Writes the rest into the staging folder, then makes all of it live.
    pub fn go_live(
        mut self,
        folder: &Path,
        state: &State,
        interrupt: &Interrupt,
        bytes_written: u64,
    ) -> Result<Generation, CheckpointError> {
        self.write(folder, state)?;
        interrupt.check()?;
        let untidy = self.pending.run(folder)?;
        let (number, parent) = (self.pending.generation, state.manifest.generation);
        let notes = untidy.map(|e| {
            format!(
                "generation {number} is live, but not all is tidied up: {e}; the next change does it"
            )
        });
        Ok(Generation {
            number,
            parent,
            bytes_written,
            added: self.line.added,
            removed: self.line.removed,
            tensors: self.line.tensors,
            notes: notes.into_iter().collect(),
        })
    }

    fn write(&mut self, folder: &Path, state: &State) -> Result<(), CheckpointError> {
        let staging = folder.join(STAGING);
        let parent = state.manifest.generation;
        let manifest = self.manifest.text();
        let last = state.journal.trim_end_matches('\n').rsplit('\n').next().unwrap_or_default();
        self.line.generation = self.pending.generation;
        self.line.previous = Some(hash_bytes(last.as_bytes()));
        self.line.manifest = hash_bytes(manifest.as_bytes());
        self.line.parent = Some(parent);
        self.line.time = Some(journal::now());
        self.line.user = journal::user();
        let journal = format!("{}{}", state.journal, self.line.text());
        let mut staged = vec![staging.clone()];
        let mut stage = |name: &str, text: &[u8]| {
            staged.push(staging.join(name));
            write_file(&staging, name, text)
        };
        let finish = &mut self.pending.finish;
        // First what readers go by, then the history.
        if let Some(config) = &self.config {
            stage(CONFIG, config.as_bytes())?;
            finish.push((CONFIG.into(), CONFIG.into()));
        }
        if let Some(index) = &self.index {
            stage(INDEX_NAME, index.as_bytes())?;
            if self.pending.to_single {
                finish.push((INDEX_NAME.into(), INDEX_NAME.into()));
            }
        }
        stage("parent.json", state.manifest_text.as_bytes())?;
        stage("manifest.json", manifest.as_bytes())?;
        stage("journal.jsonl", journal.as_bytes())?;
        finish.push(("parent.json".into(), journal::old_manifest(parent)));
        finish.push(("manifest.json".into(), MANIFEST_NAME.into()));
        finish.push(("journal.jsonl".into(), JOURNAL_NAME.into()));
        let config = self.config.is_some().then(|| folder.join(CONFIG));
        for old in state.index.iter().chain(&config) {
            let name = old.file_name().unwrap_or_default().to_string_lossy();
            let (kept, to) = (format!("parent.{name}"), journal::kept(&name, parent));
            // Its second name: the file itself is not touched when the new one takes its place.
            if fs::hard_link(old, staging.join(&kept)).is_err() {
                stage(&kept, &journal::read_optional(old)?.unwrap_or_default())?;
            }
            finish.extend(to.map(|to| (kept, to)));
        }
        let note = self.pending.text();
        staged.push(staging.join(NOTE));
        write_file(&staging, NOTE, note.as_bytes())?;
        sync_all(&staged)
    }
}

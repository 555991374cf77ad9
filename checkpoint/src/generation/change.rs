//! One change: which shards to write, what the index says then, what the journal records.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::journal::JournalLine;
use super::shards::{BASE, Shards};
use super::stage::Staged;
use super::state::{self, State};
use super::switch::{Pending, SINGLE, STAGING, clear_staging};
use super::{CONFIG, Change, Generation};
use crate::error::CheckpointError;
use crate::manifest::{FileRecord, Manifest, TOOL_VERSION, hash_bytes};
use crate::publish::free_bytes;
use crate::write::{INDEX_NAME, OutTensor, ShardPlan, Watch, WrittenShard, write_shards};

/// Room for index, manifest and journal beside the new shards.
const SMALL_FILES: u64 = 1 << 16;

/// Prepares the next generation and makes it live. The caller holds the lock.
pub(super) fn make(
    folder: &Path,
    change: &Change<'_>,
    watch: Watch<'_>,
) -> Result<Generation, CheckpointError> {
    let state = State::read(folder, watch.interrupt)?;
    let found = state.manifest.generation;
    if let Some(expected) = change.parent
        && expected != found
    {
        return Err(CheckpointError::Outdated { path: folder.to_owned(), expected, found });
    }
    let shards = Shards::plan(folder, &state, change)?;
    need(folder, &state, &shards.plans)?;
    clear_staging(folder)?;
    let staging = folder.join(STAGING);
    fs::create_dir_all(&staging)
        .map_err(|e| CheckpointError::io("creating a folder", &staging, e))?;
    let mut written = write_shards(&staging, &shards.plans, watch)?;
    let mut next = Next::of(folder, &state, change, &shards.gone, &mut written)?;
    next.tensors.extend(shards.gone.iter().cloned());
    next.tensors.sort();
    next.tensors.dedup();
    let bytes_written = next.bytes_written;
    let staged = next.staged(change);
    staged.go_live(folder, &state, watch.interrupt, bytes_written)
}

/// Checks that the new files fit.
fn need(folder: &Path, state: &State, plans: &[ShardPlan]) -> Result<(), CheckpointError> {
    let shards: u64 = plans.iter().flat_map(|p| &p.tensors).map(OutTensor::size).sum();
    let index: usize = state.weight_map.iter().map(|(t, s)| t.len() + s.len() + 16).sum();
    let small = index + state.journal.len() + 2 * state.manifest_text.len();
    let (needed, free) = (shards + small as u64 + SMALL_FILES, free_bytes(folder)?);
    match needed > free {
        true => Err(CheckpointError::NoRoom { path: folder.to_owned(), needed, free }),
        false => Ok(()),
    }
}

/// The next generation, its shards written.
struct Next {
    pending: Pending,
    manifest: Manifest,
    index: String,
    config: Option<String>,
    added: Vec<FileRecord>,
    removed: Vec<FileRecord>,
    tensors: Vec<String>,
    bytes_written: u64,
}

impl Next {
    fn of(
        folder: &Path,
        state: &State,
        change: &Change<'_>,
        gone: &BTreeSet<String>,
        written: &mut [WrittenShard],
    ) -> Result<Self, CheckpointError> {
        let mut pending =
            Pending { generation: state.manifest.generation + 1, ..Pending::default() };
        let mut weight_map = state.weight_map.clone();
        weight_map.retain(|tensor, _| !gone.contains(tensor));
        let (mut added, mut tensors, mut bytes_written) = (Vec::new(), Vec::new(), 0);
        for shard in &mut *written {
            let same =
                state.record(&shard.file.name).is_some_and(|r| r.blake3 == shard.file.blake3);
            if !same {
                free_name(folder, &mut shard.file)?;
                pending.place.push(shard.file.name.clone());
                added.push(shard.file.clone());
                bytes_written += shard.file.size;
            }
            for tensor in &shard.tensors {
                weight_map.insert(tensor.clone(), shard.file.name.clone());
                tensors.push(tensor.clone());
            }
        }
        pending.single = second_name(state, &mut weight_map, &mut added);
        let mut metadata = state.metadata.clone();
        if change.config.is_some() {
            metadata.insert("total_size".into(), json!(total(state, &weight_map, written)));
        }
        let index = state::index_text(&metadata, &weight_map);
        pending.index = hash_bytes(index.as_bytes());
        added.push(record(INDEX_NAME, &index));
        bytes_written += index.len() as u64;
        let config = change.config.as_ref().map(|config| {
            serde_json::to_string_pretty(&Value::Object(config.clone())).unwrap_or_default() + "\n"
        });
        added.extend(config.iter().map(|text| record(CONFIG, text)));
        let used: BTreeSet<&String> = weight_map.values().collect();
        let gone = |name: &String| {
            name == INDEX_NAME
                || (name == CONFIG && config.is_some())
                || (state.shards.contains_key(name) && !used.contains(name))
        };
        let old = state.manifest.files.iter();
        let (removed, kept): (Vec<_>, Vec<_>) = old.cloned().partition(|f| gone(&f.name));
        pending.store = removed
            .iter()
            .filter(|f| state.shards.contains_key(&f.name))
            .filter(|f| f.name != SINGLE || pending.single.is_none())
            .map(|f| (f.name.clone(), f.blake3.clone()))
            .collect();
        added.sort();
        let manifest = Manifest {
            tool_version: TOOL_VERSION.into(),
            generation: pending.generation,
            files: kept.into_iter().chain(added.iter().cloned()).collect(),
            ..state.manifest.clone()
        };
        Ok(Self { pending, manifest, index, config, added, removed, tensors, bytes_written })
    }

    /// Everything that goes into the staging folder beside the shards.
    fn staged(self, change: &Change<'_>) -> Staged {
        let mut manifest = self.manifest;
        if change.gate_mode.is_some() {
            manifest.gate_mode = change.gate_mode.clone();
        }
        if let Some(experts) = &change.experts {
            manifest.experts = experts.clone();
        }
        if let Some(sources) = &change.sources {
            manifest.sources = sources.clone();
        }
        let line = JournalLine {
            action: change.action.into(),
            message: change.message.map(str::to_owned),
            added: self.added,
            removed: self.removed,
            tensors: self.tensors,
            details: change.details.clone(),
            ..JournalLine::default()
        };
        Staged {
            pending: self.pending,
            manifest,
            index: Some(self.index),
            config: self.config,
            line,
        }
    }
}

/// The name that the one file of a model gets beside an index, if tensors of it are still needed.
fn second_name(
    state: &State,
    weight_map: &mut BTreeMap<String, String>,
    added: &mut Vec<FileRecord>,
) -> Option<String> {
    let needed = state.single && weight_map.values().any(|shard| shard == SINGLE);
    let record = state.record(SINGLE).filter(|_| needed)?;
    let name = format!("{BASE}{}.safetensors", short(record));
    for shard in weight_map.values_mut().filter(|shard| *shard == SINGLE) {
        shard.clone_from(&name);
    }
    added.push(FileRecord { name: name.clone(), ..record.clone() });
    Some(name)
}

/// Bytes of all tensors of the next generation.
fn total(state: &State, weight_map: &BTreeMap<String, String>, written: &[WrittenShard]) -> u64 {
    let new: BTreeSet<&String> = written.iter().flat_map(|w| &w.tensors).collect();
    let kept = weight_map.iter().filter(|(tensor, _)| !new.contains(tensor));
    let kept: usize = kept
        .filter_map(|(tensor, shard)| {
            state.tensor(shard, tensor).or_else(|| state.tensor(SINGLE, tensor))
        })
        .map(|t| t.range.len())
        .sum();
    kept as u64 + written.iter().map(|w| w.tensor_bytes).sum::<u64>()
}

/// A small file of the new generation.
pub(super) fn record(name: &str, text: &str) -> FileRecord {
    FileRecord { name: name.into(), size: text.len() as u64, blake3: hash_bytes(text.as_bytes()) }
}

/// The first digits of a file's hash, as names have them.
fn short(record: &FileRecord) -> &str {
    record.blake3.get(..8).unwrap_or(&record.blake3)
}

/// Gives a shard that is still in the staging folder more digits if the model folder has a file of its name.
fn free_name(folder: &Path, file: &mut FileRecord) -> Result<(), CheckpointError> {
    if !folder.join(&file.name).exists() {
        return Ok(());
    }
    let long = file.name.replacen(short(file), &file.blake3, 1);
    let (from, to) = (folder.join(STAGING).join(&file.name), folder.join(STAGING).join(&long));
    fs::rename(from, &to).map_err(|e| CheckpointError::io("naming a shard", &to, e))?;
    file.name = long;
    Ok(())
}

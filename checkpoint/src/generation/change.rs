//! One change: which shards to write, what the index says then, what the journal records.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::journal::{self, JOURNAL_NAME, JournalLine};
use super::state::{self, State};
use super::switch::{NOTE, Pending, SINGLE, STAGING, clear_staging, sync_all};
use super::{Change, Generation, NewTensors, name};
use crate::error::CheckpointError;
use crate::manifest::{FileRecord, MANIFEST_NAME, Manifest, TOOL_VERSION, hash_bytes};
use crate::publish::free_bytes;
use crate::write::{
    INDEX_NAME, OutTensor, SHARD_LIMIT, ShardName, ShardPlan, Watch, WrittenShard, split,
    write_file, write_shards,
};

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
    let groups = replacements(folder, &state, change)?;
    let plans = shard_plans(folder, &state, groups)?;
    need(folder, &state, &plans)?;
    clear_staging(folder)?;
    let staging = folder.join(STAGING);
    fs::create_dir_all(&staging)
        .map_err(|e| CheckpointError::io("creating a folder", &staging, e))?;
    let mut written = write_shards(&staging, &plans, watch)?;
    let mut next = Next::of(folder, &state, &mut written)?;
    next.write(&staging, &state, change)?;
    watch.interrupt.check()?;
    let untidy = next.pending.run(folder)?;
    let parent = state.manifest.generation;
    let notes = untidy.map(|e| {
        format!(
            "generation {} is live, but not all is tidied up: {e}; the next change does it",
            parent + 1
        )
    });
    Ok(Generation {
        number: parent + 1,
        parent,
        bytes_written: next.bytes_written,
        added: next.added,
        removed: next.removed,
        tensors: next.tensors,
        notes: notes.into_iter().collect(),
    })
}

/// The new tensors of each role under their names in the files, checked against the old ones.
fn replacements(
    folder: &Path,
    state: &State,
    change: &Change<'_>,
) -> Result<BTreeMap<String, Vec<OutTensor>>, CheckpointError> {
    let mut groups: BTreeMap<String, Vec<OutTensor>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for NewTensors { role, tensors } in &change.tensors {
        for (name, weight) in tensors {
            let old = state.source.weight(name)?;
            weight.expect_shape(old.shape(), &format!("as `{name}` has in the model"))?;
            let (file, stored) = old.origin();
            let shard = file.strip_prefix(folder).unwrap_or(&file).to_string_lossy();
            let whole = state.tensor(&shard, &stored).is_some_and(|t| t.shape == old.shape());
            if !whole {
                return Err(CheckpointError::Unsupported {
                    what: format!(
                        "`{name}` is a part of the fused tensor `{stored}`, which cannot be changed in place"
                    ),
                    file,
                    hint: "write the model again in the hub layout, one tensor for each expert"
                        .into(),
                });
            }
            if !seen.insert(stored.clone()) {
                return Err(CheckpointError::Malformed {
                    what: "a tensor is to be replaced twice".into(),
                    file,
                    tensor: Some(stored),
                    expected: "one new value for each tensor".into(),
                    found: format!("`{name}` again"),
                    hint: None,
                });
            }
            let tensor = OutTensor { name: stored, weight: weight.clone(), dtype: old.dtype() };
            groups.entry(role.clone()).or_default().push(tensor);
        }
    }
    Ok(groups)
}

/// The shards to write.
///
/// Where a shard of the same role would stay for some of its tensors, these move along: otherwise each change to some
/// layers would leave a further file.
fn shard_plans(
    folder: &Path,
    state: &State,
    groups: BTreeMap<String, Vec<OutTensor>>,
) -> Result<Vec<ShardPlan>, CheckpointError> {
    let mut replaced: BTreeSet<String> =
        groups.values().flatten().map(|t| t.name.clone()).collect();
    let mut plans = Vec::new();
    let mut groups: Vec<(String, Vec<OutTensor>)> = groups.into_iter().collect();
    for (role, tensors) in &mut groups {
        let own = [format!("model-{role}-"), format!("_{role}-")];
        let own = |shard: &str| {
            shard.contains(&own[1]) || shard.trim_start_matches('~').starts_with(&own[0])
        };
        let touched: BTreeSet<&String> =
            tensors.iter().filter_map(|t| state.weight_map.get(&t.name)).collect();
        for shard in touched.into_iter().filter(|s| own(s)) {
            let mut weights = state::weights_of(&folder.join(shard))?;
            let stays =
                |name: &str| state.weight_map.get(name) == Some(shard) && !replaced.contains(name);
            let rest: Vec<&String> = state.weight_map.keys().filter(|name| stays(name)).collect();
            if rest.iter().any(|name| !weights.contains_key(*name)) {
                continue;
            }
            let rest: Vec<OutTensor> = rest
                .into_iter()
                .filter_map(|name| {
                    let weight = weights.remove(name)?;
                    Some(OutTensor { name: name.clone(), dtype: weight.dtype(), weight })
                })
                .collect();
            replaced.extend(rest.iter().map(|t| t.name.clone()));
            tensors.extend(rest);
        }
    }
    for (role, tensors) in groups {
        let names: BTreeSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
        let stale: Vec<&str> = state
            .shards
            .iter()
            .filter(|(shard, held)| {
                held.iter().any(|t| names.contains(t.name.as_str()))
                    && state.weight_map.iter().any(|(t, s)| s == *shard && !replaced.contains(t))
            })
            .map(|(shard, _)| match state.single {
                true => BASE,
                false => shard.as_str(),
            })
            .collect();
        let stem = name::stem(&role, &stale)?;
        let parts = split(tensors, SHARD_LIMIT);
        let many = parts.len() > 1;
        for (i, tensors) in parts.into_iter().enumerate() {
            let stem = if many { format!("{stem}-{:05}", i + 1) } else { stem.clone() };
            plans.push(ShardPlan { name: ShardName::ByContent(stem), tensors });
        }
    }
    Ok(plans)
}

/// How the one file of a model is called beside an index, with a hash behind it: it comes before all other roles.
const BASE: &str = "model-base-";

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
    added: Vec<FileRecord>,
    removed: Vec<FileRecord>,
    tensors: Vec<String>,
    bytes_written: u64,
}

impl Next {
    fn of(
        folder: &Path,
        state: &State,
        written: &mut [WrittenShard],
    ) -> Result<Self, CheckpointError> {
        let mut pending =
            Pending { generation: state.manifest.generation + 1, ..Pending::default() };
        let mut weight_map = state.weight_map.clone();
        let (mut added, mut tensors, mut bytes_written) = (Vec::new(), Vec::new(), 0);
        for shard in written {
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
        tensors.sort();
        if state.single
            && weight_map.values().any(|s| s == SINGLE)
            && let Some(record) = state.record(SINGLE)
        {
            let name = format!("{BASE}{}.safetensors", short(record));
            for shard in weight_map.values_mut().filter(|s| *s == SINGLE) {
                *shard = name.clone();
            }
            added.push(FileRecord { name: name.clone(), ..record.clone() });
            pending.single = Some(name);
        }
        let index = state::index_text(&state.metadata, &weight_map);
        let record = FileRecord {
            name: INDEX_NAME.into(),
            size: index.len() as u64,
            blake3: hash_bytes(index.as_bytes()),
        };
        pending.index = record.blake3.clone();
        bytes_written += record.size;
        added.push(record);
        let used: BTreeSet<&String> = weight_map.values().collect();
        let gone = |name: &String| {
            name == INDEX_NAME || (state.shards.contains_key(name) && !used.contains(name))
        };
        let old = state.manifest.files.iter();
        let (removed, kept): (Vec<_>, Vec<_>) = old.cloned().partition(|f| gone(&f.name));
        pending.store = removed
            .iter()
            .filter(|f| f.name != INDEX_NAME && (f.name != SINGLE || pending.single.is_none()))
            .map(|f| (f.name.clone(), f.blake3.clone()))
            .collect();
        added.sort();
        let manifest = Manifest {
            tool_version: TOOL_VERSION.into(),
            generation: pending.generation,
            files: kept.into_iter().chain(added.iter().cloned()).collect(),
            ..state.manifest.clone()
        };
        Ok(Self { pending, manifest, index, added, removed, tensors, bytes_written })
    }

    /// Writes index, manifest and journal into the staging folder.
    fn write(
        &mut self,
        staging: &Path,
        state: &State,
        change: &Change<'_>,
    ) -> Result<(), CheckpointError> {
        if change.gate_mode.is_some() {
            self.manifest.gate_mode = change.gate_mode.clone();
        }
        let manifest = self.manifest.text();
        let last = state.journal.trim_end_matches('\n').rsplit('\n').next().unwrap_or_default();
        let line = JournalLine {
            generation: self.pending.generation,
            action: change.action.into(),
            previous: Some(hash_bytes(last.as_bytes())),
            manifest: hash_bytes(manifest.as_bytes()),
            parent: Some(state.manifest.generation),
            message: change.message.map(str::to_owned),
            time: Some(journal::now()),
            user: journal::user(),
            added: self.added.clone(),
            removed: self.removed.clone(),
            tensors: self.tensors.clone(),
            details: change.details.clone(),
        };
        let journal = format!("{}{}", state.journal, line.text());
        let mut staged = vec![staging.to_owned()];
        let mut stage = |name: &str, text: &str| {
            staged.push(staging.join(name));
            write_file(staging, name, text.as_bytes())
        };
        stage("parent.json", &state.manifest_text)?;
        stage("manifest.json", &manifest)?;
        stage("journal.jsonl", &journal)?;
        stage(INDEX_NAME, &self.index)?;
        let finish = &mut self.pending.finish;
        finish.push(("parent.json".into(), journal::old_manifest(state.manifest.generation)));
        finish.push(("manifest.json".into(), MANIFEST_NAME.into()));
        finish.push(("journal.jsonl".into(), JOURNAL_NAME.into()));
        if let Some(old) = &state.index {
            // Its second name: the file itself is not touched when the new index takes its place.
            let kept = "parent.index.json";
            if fs::hard_link(old, staging.join(kept)).is_err() {
                let text = journal::read_optional(old)?.unwrap_or_default();
                stage(kept, &String::from_utf8_lossy(&text))?;
            }
            finish.push((kept.into(), journal::old_index(state.manifest.generation)));
        }
        stage(NOTE, &self.pending.text())?;
        sync_all(&staged)
    }
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

//! Generations of the past: where their files are now, what they hold, going back to one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::change::record;
use super::journal::{self, JournalLine, history, old_manifest, read_optional};
use super::stage::Staged;
use super::state::{self, State};
use super::switch::{Pending, SINGLE, STAGING, View, blob, clear_staging, sync_all};
use super::{CONFIG, Generation};
use crate::error::CheckpointError;
use crate::manifest::{FileRecord, MANIFEST_NAME, Manifest, TOOL_VERSION, hash_bytes, hash_files};
use crate::publish::Interrupt;
use crate::source::Source;
use crate::weight::WeightRef;
use crate::write::{INDEX_NAME, Watch};
use crate::{ConfigJson, folder as model_folder, index, layout, shard};

/// A generation, and where its files are now.
pub(super) struct Old {
    pub manifest: Manifest,
    /// Its weight files by their names then.
    files: BTreeMap<String, PathBuf>,
    /// Its index, if it had one.
    index: Option<Vec<u8>>,
    /// Its `config.json`.
    config: PathBuf,
}

impl Old {
    /// Finds the files of a generation of the journal: in the folder, or in the store.
    pub fn find(
        folder: &Path,
        lines: &[JournalLine],
        generation: u32,
    ) -> Result<Self, CheckpointError> {
        let last = lines.last().map(|l| l.generation);
        let is_last = last == Some(generation);
        if !lines.iter().any(|l| l.generation == generation) {
            let path = folder.to_owned();
            return Err(CheckpointError::NoGeneration { path, wanted: generation, last });
        }
        let view = View::of(folder)?;
        let name = if is_last { MANIFEST_NAME.to_owned() } else { old_manifest(generation) };
        let (path, bytes) = view.read(&name)?;
        let manifest = Manifest::parse(&bytes.unwrap_or_default(), path.clone())?;
        stays_inside(&manifest, path)?;
        let live = Manifest::load(folder)?.map(|m| m.files).unwrap_or_default();
        let mut files = BTreeMap::new();
        for file in manifest.files.iter().filter(|f| f.name.ends_with(".safetensors")) {
            let place = place(folder, &live, file)
                .ok_or_else(|| is_gone(blob(folder, &file.blake3), &file.name, generation))?;
            files.insert(file.name.clone(), place);
        }
        let small = |name: &str| {
            let Some(wanted) = manifest.files.iter().find(|f| f.name == name) else {
                return Ok(None);
            };
            small(folder, &view, lines, wanted, generation).map(Some)
        };
        let index = small(INDEX_NAME)?;
        let index = index.map(|p| read_optional(&p)).transpose()?.flatten();
        let config = small(CONFIG)?.unwrap_or_else(|| folder.join(CONFIG));
        Ok(Self { manifest, files, index, config })
    }

    /// Which of its files holds which tensor.
    fn weight_map(&self) -> Result<BTreeMap<String, String>, CheckpointError> {
        if let Some(text) = &self.index {
            return Ok(index::parse(text, Path::new(INDEX_NAME))?.weight_map);
        }
        let mut map = BTreeMap::new();
        for (name, path) in &self.files {
            let opened = shard::open(path)?;
            let all =
                opened.weights.iter().map(|(n, _)| n).chain(opened.other.iter().map(|o| &o.name));
            map.extend(all.map(|tensor| (tensor.clone(), name.clone())));
        }
        Ok(map)
    }

    /// Its weights, as [`Source::tensors`] has them.
    fn tensors(&self, config: &ConfigJson) -> Result<BTreeMap<String, WeightRef>, CheckpointError> {
        let map = self.weight_map()?;
        let mut tensors = BTreeMap::new();
        for (name, path) in &self.files {
            for (tensor, weight) in shard::open(path)?.weights {
                if map.get(&tensor) == Some(name) {
                    tensors.insert(tensor, Arc::new(weight) as WeightRef);
                }
            }
        }
        layout::canonical(tensors, config)
    }
}

/// Refuses a manifest that would lead out of the folder.
fn stays_inside(manifest: &Manifest, path: PathBuf) -> Result<(), CheckpointError> {
    let hexadecimal = |hash: &str| hash.bytes().all(|b| b.is_ascii_hexdigit());
    let bad = manifest
        .files
        .iter()
        .find(|f| index::unsafe_name(&f.name).is_some() || !hexadecimal(&f.blake3));
    match bad {
        None => Ok(()),
        Some(file) => Err(CheckpointError::Malformed {
            what: "the manifest names a file outside the folder".into(),
            file: path,
            tensor: None,
            expected: "names below the model folder, hashes in hexadecimal".into(),
            found: format!("`{}`, hash `{}`", file.name, file.blake3),
            hint: Some("do not use this folder unless you know where it comes from".into()),
        }),
    }
}

/// Where the bytes of a weight file are.
fn place(folder: &Path, live: &[FileRecord], file: &FileRecord) -> Option<PathBuf> {
    let named = live.iter().find(|l| l.name == file.name && l.blake3 == file.blake3);
    let other = || live.iter().find(|l| l.blake3 == file.blake3);
    let live = |l: Option<&FileRecord>| l.map(|l| folder.join(&l.name)).filter(|p| p.exists());
    live(named)
        .or_else(|| Some(blob(folder, &file.blake3)).filter(|p| p.exists()))
        .or_else(|| live(other()))
}

/// Where index or configuration of a generation is: kept when another one took its place, or still live.
fn small(
    folder: &Path,
    view: &View,
    lines: &[JournalLine],
    wanted: &FileRecord,
    generation: u32,
) -> Result<PathBuf, CheckpointError> {
    let later = lines.iter().map(|l| l.generation).filter(|g| *g >= generation);
    let kept = later.filter_map(|g| journal::kept(&wanted.name, g)).map(|name| view.find(&name).0);
    for path in kept.chain([view.find(&wanted.name).0]) {
        if read_optional(&path)?.is_some_and(|bytes| hash_bytes(&bytes) == wanted.blake3) {
            return Ok(path);
        }
    }
    Err(is_gone(folder.join(&wanted.name), &wanted.name, generation))
}

fn is_gone(file: PathBuf, name: &str, generation: u32) -> CheckpointError {
    CheckpointError::Malformed {
        what: format!("`{name}` of generation {generation} is gone"),
        file,
        tensor: None,
        expected: "the file as the generation had it".into(),
        found: "no such file".into(),
        hint: Some(
            "it was removed, by `history --prune` or by hand; that generation cannot come back"
                .into(),
        ),
    }
}

/// The model as it was in `generation`. Nothing but headers is read.
///
/// # Errors
/// [`CheckpointError::NoGeneration`]; [`CheckpointError::Malformed`] if a file of it was removed, or the history is
/// broken.
pub fn open_old(folder: &Path, generation: u32) -> Result<Source, CheckpointError> {
    let lines = history(folder)?;
    let old = Old::find(folder, &lines, generation)?;
    let config = model_folder::config_at(&old.config)?;
    let tensors = old.tensors(&config)?;
    let mut notes = Vec::new();
    let side = model_folder::side_files(folder, &mut notes);
    Ok(Source {
        label: format!("{}, generation {generation}", folder.display()),
        path: folder.to_owned(),
        config,
        tensors,
        other: Vec::new(),
        files: old.files.into_values().collect(),
        side,
        notes,
    })
}

/// The manifest of `generation`.
///
/// # Errors
/// As [`open_old`].
pub fn manifest(folder: &Path, generation: u32) -> Result<Manifest, CheckpointError> {
    Ok(Old::find(folder, &history(folder)?, generation)?.manifest)
}

/// The generation that `rollback` goes back to when none is named: the one before the last change that stands.
///
/// A rollback stands for the generation it went back to, so that going back twice goes back by two changes.
pub fn before(lines: &[JournalLine]) -> Option<u32> {
    let mut line = lines.last()?;
    while let Some(to) = line.details["to"].as_u64().filter(|_| line.action == ROLLBACK) {
        line = lines
            .iter()
            .find(|l| u64::from(l.generation) == to && l.generation < line.generation)?;
    }
    line.parent
}

/// What the journal calls going back.
const ROLLBACK: &str = "rollback";

/// Makes the next generation of the files that `to` had. The caller holds the lock.
pub(super) fn go_back(
    folder: &Path,
    to: Option<u32>,
    message: Option<&str>,
    watch: Watch<'_>,
) -> Result<Generation, CheckpointError> {
    let lines = history(folder)?;
    let last = lines.last().map(|l| l.generation);
    let none = |wanted| CheckpointError::NoGeneration { path: folder.to_owned(), wanted, last };
    let to = to.or_else(|| before(&lines)).ok_or_else(|| none(0))?;
    if last.is_none() {
        return Err(none(to));
    }
    let old = Old::find(folder, &lines, to)?;
    let state = State::read(folder, watch.interrupt)?;
    let needed = old.to_place(folder, &state);
    verify(&needed, watch.interrupt)?;
    clear_staging(folder)?;
    let mut next = Next::of(&old, &state, &needed, to)?;
    next.place(folder, &needed)?;
    let written = next.staged.index.as_ref().map_or(0, |text| text.len() as u64);
    next.staged.line.message = message.map(str::to_owned);
    next.staged.go_live(folder, &state, watch.interrupt, written)
}

/// A weight file that is not live, and where its bytes are.
struct Needed {
    file: FileRecord,
    from: PathBuf,
}

impl Old {
    /// Its weight files that the live generation has not, or has under another name.
    fn to_place(&self, folder: &Path, state: &State) -> Vec<Needed> {
        let live = |f: &FileRecord| {
            state.record(&f.name).is_some_and(|l| l.blake3 == f.blake3)
                && folder.join(&f.name).exists()
        };
        self.manifest
            .files
            .iter()
            .filter(|f| !live(f))
            .filter_map(|f| {
                Some(Needed { file: f.clone(), from: self.files.get(&f.name)?.clone() })
            })
            .collect()
    }
}

/// Whether files that come back are as they were.
fn verify(needed: &[Needed], interrupt: &Interrupt) -> Result<(), CheckpointError> {
    let paths: Vec<PathBuf> = needed.iter().map(|n| n.from.clone()).collect();
    let found = hash_files(&paths, interrupt)?;
    for Needed { file, from } in needed {
        let found = found.get(from).map(|f| f.blake3.clone()).unwrap_or_default();
        if found != file.blake3 {
            return Err(CheckpointError::Malformed {
                what: format!("`{}` is not as it was", file.name),
                file: from.clone(),
                tensor: None,
                expected: format!("hash {}", file.blake3),
                found: format!("hash {found}"),
                hint: Some("the file is damaged; that generation cannot come back".into()),
            });
        }
    }
    Ok(())
}

/// The next generation, as an old one was.
struct Next {
    staged: Staged,
}

impl Next {
    fn of(old: &Old, state: &State, needed: &[Needed], to: u32) -> Result<Self, CheckpointError> {
        let to_single = needed.iter().any(|n| n.file.name == SINGLE);
        let map = old.weight_map()?;
        let index = match &old.index {
            Some(text) => Some(String::from_utf8_lossy(text).into_owned()),
            None if to_single => None,
            // Shards that were found without an index get one: taking the present one away would leave nothing to switch.
            None => Some(state::index_text(&metadata(old, &map)?, &map)),
        };
        let config = read_optional(&old.config)?.filter(|bytes| {
            state.record(CONFIG).is_none_or(|live| live.blake3 != hash_bytes(bytes))
        });
        let config = config.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let then = &old.manifest.files;
        let mut files: Vec<FileRecord> =
            then.iter().filter(|f| f.name != INDEX_NAME).cloned().collect();
        files.extend(index.iter().map(|text| record(INDEX_NAME, text)));
        let is_in = |file: &FileRecord, files: &[FileRecord]| {
            files.iter().any(|f| f.name == file.name && f.blake3 == file.blake3)
        };
        let differ = |from: &[FileRecord], other: &[FileRecord]| {
            let differs = |f: &&FileRecord| f.name == INDEX_NAME || !is_in(f, other);
            from.iter().filter(differs).cloned().collect::<Vec<_>>()
        };
        let (added, removed) =
            (differ(&files, &state.manifest.files), differ(&state.manifest.files, &files));
        let pending = Pending {
            generation: state.manifest.generation + 1,
            index: index.as_ref().map_or(String::new(), |text| hash_bytes(text.as_bytes())),
            to_single,
            place: needed.iter().map(|n| n.file.name.clone()).filter(|n| n != SINGLE).collect(),
            store: removed
                .iter()
                .filter(|f| state.shards.contains_key(&f.name))
                .map(|f| (f.name.clone(), f.blake3.clone()))
                .collect(),
            ..Pending::default()
        };
        let line = JournalLine {
            action: ROLLBACK.into(),
            tensors: moved(state, &map, &added),
            added,
            removed,
            details: json!({ "to": to }),
            ..JournalLine::default()
        };
        let manifest = Manifest {
            tool_version: TOOL_VERSION.into(),
            generation: pending.generation,
            files,
            ..old.manifest.clone()
        };
        Ok(Self { staged: Staged { pending, manifest, index, config, line } })
    }

    /// Puts the files that come back into the staging folder: as further names of what the store has, where the file
    /// system knows such.
    fn place(&self, folder: &Path, needed: &[Needed]) -> Result<(), CheckpointError> {
        let staging = folder.join(STAGING);
        fs::create_dir_all(&staging)
            .map_err(|e| CheckpointError::io("creating a folder", &staging, e))?;
        let mut copied = Vec::new();
        for Needed { file, from } in needed {
            let to = staging.join(&file.name);
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)
                    .map_err(|e| CheckpointError::io("creating a folder", parent, e))?;
            }
            if fs::hard_link(from, &to).is_err() {
                fs::copy(from, &to).map_err(|e| CheckpointError::io("bringing back", &to, e))?;
                copied.push(to);
            }
        }
        sync_all(&copied)
    }
}

/// Tensors that are in other files than before.
fn moved(state: &State, map: &BTreeMap<String, String>, added: &[FileRecord]) -> Vec<String> {
    let added: BTreeSet<&str> = added.iter().map(|f| f.name.as_str()).collect();
    let other = |tensor: &&String| {
        state.weight_map.get(*tensor) != map.get(*tensor)
            || map.get(*tensor).is_some_and(|file| added.contains(file.as_str()))
    };
    let all: BTreeSet<&String> = state.weight_map.keys().chain(map.keys()).collect();
    all.into_iter().filter(other).cloned().collect()
}

/// `total_size` of a generation without an index.
fn metadata(
    old: &Old,
    map: &BTreeMap<String, String>,
) -> Result<Map<String, Value>, CheckpointError> {
    let mut bytes = 0;
    for (name, path) in &old.files {
        let weights = shard::open(path)?.weights;
        let own = weights.iter().filter(|(tensor, _)| map.get(tensor) == Some(name));
        bytes += own
            .map(|(_, w)| (w as &dyn crate::Weight).size_in(crate::Weight::dtype(w)))
            .sum::<u64>();
    }
    Ok(Map::from_iter([("total_size".to_owned(), json!(bytes))]))
}

//! What a model folder is before a change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::journal::{self, JournalLine, read_optional};
use super::switch::SINGLE;
use crate::error::CheckpointError;
use crate::header::{self, TensorInfo};
use crate::hub::Hub;
use crate::manifest::{
    FileRecord, JOURNAL_NAME, MANIFEST_NAME, MANIFEST_VERSION, Manifest, TOOL_VERSION, hash_bytes,
    hash_files,
};
use crate::map::MappedFile;
use crate::publish::Interrupt;
use crate::source::Source;
use crate::source_ref::SourceRef;
use crate::write::INDEX_NAME;
use crate::{file, index};

/// A model folder as loaders see it, with its history.
pub(super) struct State {
    /// The model.
    pub source: Source,
    /// The shards, and what is in them.
    pub shards: BTreeMap<String, Vec<TensorInfo>>,
    /// Which shard holds which tensor.
    pub weight_map: BTreeMap<String, String>,
    /// `metadata` of the index, with `total_size`.
    pub metadata: Map<String, Value>,
    /// The index, if there is one.
    pub index: Option<PathBuf>,
    /// Whether the model is one file without an index.
    pub single: bool,
    pub manifest: Manifest,
    /// The text of the manifest.
    pub manifest_text: String,
    /// The text of the journal.
    pub journal: String,
}

/// The full path of a folder that may be changed.
///
/// # Errors
/// [`CheckpointError::Unsupported`] for a single file and for a snapshot of the Hub cache, and what
/// `config.json` has wrong.
pub(super) fn changeable(folder: &Path) -> Result<PathBuf, CheckpointError> {
    let unsupported = |what: &str, hint: &str| CheckpointError::Unsupported {
        what: what.into(),
        file: folder.to_owned(),
        hint: hint.into(),
    };
    let path = folder.canonicalize().map_err(|e| CheckpointError::io("opening", folder, e))?;
    if !path.is_dir() {
        return Err(unsupported(
            "only a model folder can be changed in place",
            "name a folder with `config.json` and safetensors",
        ));
    }
    crate::folder::config(&path)?;
    let mut parents = path.ancestors().skip(1).filter_map(|p| p.file_name()?.to_str());
    if parents.next() == Some("snapshots")
        && parents.next().is_some_and(|n| n.starts_with("models--"))
    {
        return Err(unsupported(
            "a model in the Hub cache is not changed in place",
            "copy it first: `cp -rL SNAPSHOT FOLDER`",
        ));
    }
    Ok(path)
}

impl State {
    /// Opens the model and its history; hashes every file of a folder that has none.
    pub fn read(folder: &Path, interrupt: &Interrupt) -> Result<Self, CheckpointError> {
        let reference = SourceRef {
            model: folder.display().to_string(),
            revision: None,
            lora: None,
            lora_revision: None,
        };
        let source = Source::open_with(&reference, Path::new(""), &Hub::default())?;
        let index_path = folder.join(INDEX_NAME);
        let index_text = read_optional(&index_path)?;
        let single = folder.join(SINGLE).exists();
        no_links(folder, &source.files)?;
        let mut shards = BTreeMap::new();
        for path in &source.files {
            let name = path.strip_prefix(folder).unwrap_or(path).to_string_lossy().into_owned();
            let mapped = MappedFile::open(path)?;
            shards.insert(name, header::parse(mapped.bytes(), path)?.tensors);
        }
        let in_shards = || {
            let all = shards.iter().flat_map(|(f, ts)| ts.iter().map(move |t| (t, f)));
            all.map(|(t, f)| (t.name.clone(), f.clone())).collect::<BTreeMap<_, _>>()
        };
        let (weight_map, mut metadata) = match &index_text {
            Some(text) => {
                let map = index::parse(text, &index_path)?.weight_map;
                if single && map.values().any(|shard| shard != SINGLE) {
                    return Err(two_models(folder));
                }
                let index: Value = serde_json::from_slice(text).unwrap_or_default();
                (map, index["metadata"].as_object().cloned().unwrap_or_default())
            }
            None => (in_shards(), Map::new()),
        };
        if !metadata.get("total_size").is_some_and(Value::is_u64) {
            let all = shards.iter().flat_map(|(f, ts)| ts.iter().map(move |t| (f, t)));
            let bytes: usize = all
                .filter(|(shard, t)| weight_map.get(&t.name) == Some(*shard))
                .map(|(_, t)| t.range.len())
                .sum();
            metadata.insert("total_size".into(), json!(bytes));
        }
        let known = known_history(folder, index_text.as_deref())?;
        let (manifest, manifest_text, journal) = match known {
            Some(known) => known,
            None => import(folder, &source, &shards, interrupt)?,
        };
        Ok(Self {
            source,
            shards,
            weight_map,
            metadata,
            index: index_text.map(|_| index_path),
            single,
            manifest,
            manifest_text,
            journal,
        })
    }

    /// The record of a file in the manifest.
    pub fn record(&self, name: &str) -> Option<&FileRecord> {
        self.manifest.files.iter().find(|f| f.name == name)
    }

    /// A tensor of a shard.
    pub fn tensor(&self, shard: &str, name: &str) -> Option<&TensorInfo> {
        self.shards.get(shard)?.iter().find(|t| t.name == name)
    }
}

/// Which of two models is meant cannot be told, and after a change nobody could go back.
fn two_models(folder: &Path) -> CheckpointError {
    CheckpointError::Unsupported {
        what: format!("there is `{SINGLE}`, and an index that names other files"),
        file: folder.to_owned(),
        hint: format!("remove the one that is not the model: `{SINGLE}` or `{INDEX_NAME}`"),
    }
}

/// Refuses links: what they point at is not ours to move.
fn no_links(folder: &Path, files: &[PathBuf]) -> Result<(), CheckpointError> {
    let index = folder.join(INDEX_NAME);
    let all = files.iter().chain(std::iter::once(&index));
    match all.into_iter().find(|f| f.symlink_metadata().is_ok_and(|m| m.is_symlink())) {
        None => Ok(()),
        Some(link) => Err(CheckpointError::Unsupported {
            what: "a model whose files are links is not changed in place".into(),
            file: link.clone(),
            hint: "copy the folder first, with what the links point at: `cp -rL FOLDER COPY`"
                .into(),
        }),
    }
}

/// Manifest, its text and the journal, if this program has written or changed the folder.
fn known_history(
    folder: &Path,
    index: Option<&[u8]>,
) -> Result<Option<(Manifest, String, String)>, CheckpointError> {
    let path = folder.join(MANIFEST_NAME);
    let Some(bytes) = read_optional(&path)? else { return Ok(None) };
    let manifest = Manifest::parse(&bytes, path)?;
    let lines = journal::history(folder)?;
    let recorded = manifest.files.iter().find(|f| f.name == INDEX_NAME).map(|f| f.blake3.clone());
    let found = index.map(hash_bytes);
    let last = lines.last().map(|l| l.generation);
    if recorded != found || last != Some(manifest.generation) {
        let show = |hash: Option<String>| hash.unwrap_or("no index".into());
        return Err(CheckpointError::Malformed {
            what: "the model is not as its last generation left it".into(),
            file: folder.join(INDEX_NAME),
            tensor: None,
            expected: format!("{} (generation {})", show(recorded), manifest.generation),
            found: match last {
                Some(last) if last != manifest.generation => format!("a journal up to {last}"),
                Some(_) => show(found),
                None => "no journal".into(),
            },
            hint: Some(
                "`moe-merge verify` tells what differs; to start a new history, remove `.moe-merge`".into(),
            ),
        });
    }
    let path = folder.join(JOURNAL_NAME);
    let journal = read_optional(&path)?.unwrap_or_default();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Some((manifest, text(bytes), text(journal))))
}

/// Generation 0 of a folder that another program wrote: its files as they are.
fn import(
    folder: &Path,
    source: &Source,
    shards: &BTreeMap<String, Vec<TensorInfo>>,
    interrupt: &Interrupt,
) -> Result<(Manifest, String, String), CheckpointError> {
    let mut names: BTreeSet<String> = shards.keys().cloned().collect();
    let listed = fs::read_dir(folder).map_err(|e| CheckpointError::io("listing", folder, e))?;
    for entry in listed.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_file() && !name.starts_with('.') {
            names.insert(name);
        }
    }
    let paths: Vec<PathBuf> = names.iter().map(|n| folder.join(n)).collect();
    let hashed = hash_files(&paths, interrupt)?;
    let files = names
        .into_iter()
        .filter_map(|name| {
            Some(FileRecord { name: name.clone(), ..hashed.get(&folder.join(name))?.clone() })
        })
        .collect();
    let mut manifest = Manifest {
        version: MANIFEST_VERSION,
        tool_version: TOOL_VERSION.into(),
        generation: 0,
        family: source.config.model_type().into(),
        experts: Vec::new(),
        gate_mode: None,
        align: None,
        seed: 0,
        recipe_blake3: None,
        sources: Vec::new(),
        files,
    };
    let text = manifest.text();
    let line = JournalLine {
        action: "import".into(),
        manifest: hash_bytes(text.as_bytes()),
        time: Some(journal::now()),
        user: journal::user(),
        ..JournalLine::default()
    };
    Ok((manifest, text, line.text()))
}

/// The new index: what the old one says, with other files for some tensors.
pub(super) fn index_text(
    metadata: &Map<String, Value>,
    weight_map: &BTreeMap<String, String>,
) -> String {
    serde_json::to_string_pretty(&json!({ "metadata": metadata, "weight_map": weight_map }))
        .unwrap_or_default()
        + "\n"
}

/// All tensors of a shard that can be written again.
pub(super) fn weights_of(
    path: &Path,
) -> Result<BTreeMap<String, crate::weight::WeightRef>, CheckpointError> {
    file::expect_regular(path)?;
    let shard = crate::shard::open(path)?;
    Ok(shard
        .weights
        .into_iter()
        .map(|(name, weight)| (name, std::sync::Arc::new(weight) as crate::weight::WeightRef))
        .collect())
}

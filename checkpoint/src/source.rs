//! Anything that holds a model's weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::adapter;
use crate::config_json::ConfigJson;
use crate::error::CheckpointError;
use crate::file;
use crate::folder;
use crate::gguf;
use crate::hub::{self, Hub, RepoKind};
use crate::layout;
use crate::shard::{self, OtherTensor};
use crate::source_ref::{SourceRef, located};
use crate::weight::WeightRef;

/// A file that belongs to a model beside its weights: tokenizer, generation config, chat template.
#[derive(Debug, Clone)]
pub struct SideFile {
    /// Its name in a model folder.
    pub name: String,
    /// What is in it.
    pub content: SideContent,
}

/// Where the bytes of a [`SideFile`] are.
#[derive(Debug, Clone)]
pub enum SideContent {
    /// In a file, to be copied byte for byte.
    File(PathBuf),
    /// In memory: rebuilt from GGUF metadata.
    Bytes(Arc<[u8]>),
}

impl SideFile {
    /// The bytes.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if the file cannot be read.
    pub fn read(&self) -> Result<Vec<u8>, CheckpointError> {
        match &self.content {
            SideContent::File(path) => {
                std::fs::read(path).map_err(|e| CheckpointError::io("reading", path, e))
            }
            SideContent::Bytes(bytes) => Ok(bytes.to_vec()),
        }
    }
}

/// A model on disk, opened: nothing but headers has been read.
#[derive(Debug, Clone)]
pub struct Source {
    /// As the person wrote it, for messages and reports.
    pub label: String,
    /// The folder or file that was opened.
    pub path: PathBuf,
    /// `config.json`, or what GGUF metadata says in its terms.
    pub config: ConfigJson,
    /// Weights by Hugging Face name, experts always one by one (fused layouts are seen as slices).
    pub tensors: BTreeMap<String, WeightRef>,
    /// Tensors that are no weights (position buffers), or in a dtype that is not computed with.
    pub other: Vec<OtherTensor>,
    /// Files the weights come from, adapters included: what a manifest has to record.
    pub files: Vec<PathBuf>,
    /// Tokenizer, generation config, chat template.
    pub side: Vec<SideFile>,
    /// Things a person should know: an adapter that also changes a tied head, a tokenizer that had to be rebuilt.
    pub notes: Vec<String>,
}

/// Side files that are carried over byte for byte.
pub const SIDE_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "normalizer.json",
];

/// How often a model may be replaced while it is opened.
const REPLACED: usize = 200;

/// How long a change gets to go a step further.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(2);

impl Source {
    /// Opens a model; relative paths are as [`located`] says, Hub names from the cache that the environment names.
    ///
    /// A path that exists wins over a Hub name. No weight is read.
    ///
    /// # Errors
    /// [`CheckpointError`] if it is not there, not readable, or not what it should be.
    pub fn open(source: &SourceRef, base_dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(source, base_dir, &Hub::from_env())
    }

    /// The same with another Hub cache.
    ///
    /// # Errors
    /// As [`Source::open`].
    pub fn open_with(
        source: &SourceRef,
        base_dir: &Path,
        hub: &Hub,
    ) -> Result<Self, CheckpointError> {
        let source = source.settle(base_dir);
        let revision = source.revision.as_deref();
        let model = locate(&source.model, revision, base_dir, hub, RepoKind::Model)?;
        let adapter = source
            .lora
            .as_deref()
            .map(|l| locate(l, source.lora_revision.as_deref(), base_dir, hub, RepoKind::Adapter))
            .transpose()?;
        let notes = model.note.into_iter().chain(adapter.as_ref().and_then(|a| a.note.clone()));
        let mut opened = Self::assemble(&model.path, adapter.as_ref().map(|a| a.path.as_path()))?;
        opened.notes.splice(0..0, notes);
        opened.label = source.to_string();
        Ok(opened)
    }

    /// Opens one safetensors file that need not be a model: its tensors, without a configuration.
    ///
    /// # Errors
    /// [`CheckpointError`] if it is not there, not readable, or no safetensors file.
    pub fn open_tensors(path: &Path) -> Result<Self, CheckpointError> {
        if let Err(e) = path.metadata()
            && e.kind() == std::io::ErrorKind::NotFound
        {
            return Err(CheckpointError::NotFound {
                hint: not_found_hint(path),
                path: path.to_owned(),
            });
        }
        let shard = shard::open(path)?;
        let weights = shard.weights.into_iter().map(|(n, w)| (n, Arc::new(w) as WeightRef));
        Ok(Self {
            label: path.display().to_string(),
            path: path.to_owned(),
            config: ConfigJson::default(),
            tensors: weights.collect(),
            other: shard.other,
            files: vec![path.to_owned()],
            side: Vec::new(),
            notes: Vec::new(),
        })
    }

    /// The three steps of opening: the file format, the layout of its experts, the adapter on top.
    fn assemble(model: &Path, adapter: Option<&Path>) -> Result<Self, CheckpointError> {
        let is_gguf = model.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        let mut opened =
            if is_gguf && model.is_file() { gguf::open(model)? } else { Self::open_folder(model)? };
        opened.tensors = layout::canonical(opened.tensors, &opened.config)?;
        match adapter {
            None => Ok(opened),
            Some(folder) => adapter::apply(opened, folder),
        }
    }

    /// Opens a folder; once more if its model was replaced by another generation meanwhile.
    fn open_folder(path: &Path) -> Result<Self, CheckpointError> {
        for _ in 0..REPLACED {
            let before = folder::changes(path);
            let opened = Self::open_folder_once(path);
            if folder::changes(path) == before {
                return opened;
            }
            std::thread::sleep(PAUSE);
        }
        Err(CheckpointError::Busy { path: path.to_owned() })
    }

    fn open_folder_once(path: &Path) -> Result<Self, CheckpointError> {
        // The weights come first: a folder of another kind (an adapter, a GGUF file, PyTorch pickles) is told by them.
        let shards = folder::shards(path)?;
        let config = folder::config(path)?;
        let tensors = folder::tensors(&shards)?;
        let mut notes = shards.notes;
        notes.extend(tensors.notes);
        let side = folder::side_files(path, &mut notes);
        Ok(Self {
            label: path.display().to_string(),
            path: path.to_owned(),
            config,
            tensors: tensors.weights,
            other: tensors.other,
            files: shards.files,
            side,
            notes,
        })
    }

    /// The weight `name`.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], with the nearest name there is; [`CheckpointError::Malformed`] if it is
    /// there in a dtype that is not computed with (`F64`, `F8_E4M3`, `I8`, …).
    pub fn weight(&self, name: &str) -> Result<&WeightRef, CheckpointError> {
        self.tensors.get(name).ok_or_else(|| self.missing(name))
    }

    /// Why there is no weight of that name: it, or what seems to stand in its place, has a dtype that is not computed with, or
    /// nothing is there.
    pub fn missing(&self, name: &str) -> CheckpointError {
        let stem = name.rsplit_once('.').map(|(stem, _)| stem);
        let beside = |o: &&OtherTensor| {
            stem.is_some() && o.name.rsplit_once('.').map(|(stem, _)| stem) == stem
        };
        let same = self.other(name);
        let packed = || self.other.iter().filter(|o| o.is_weight()).find(beside);
        if let Some(other) = same.or_else(packed) {
            return other.unsupported();
        }
        let alike = self.tensors.keys().map(String::as_str).filter(|n| same_numbers(n, name));
        CheckpointError::MissingTensor {
            file: self.path.clone(),
            tensor: name.to_owned(),
            nearest: file::nearest(name, alike).map(str::to_owned),
        }
    }

    /// For work that goes through all weights, whatever their names.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] if one of them has a dtype that is not computed with ([`OtherTensor::is_weight`]).
    pub fn computable(&self) -> Result<(), CheckpointError> {
        let quantised = self.config.0.contains_key("quantization_config");
        let weight = |o: &&OtherTensor| o.is_weight() || quantised && o.bytes().is_some();
        self.other.iter().find(weight).map_or(Ok(()), |o| Err(o.unsupported()))
    }

    /// The tensor `name`, if it is there and is no weight.
    pub fn other(&self, name: &str) -> Option<&OtherTensor> {
        self.other.iter().find(|o| o.name == name)
    }

    /// The side file `name`, if the model has it.
    pub fn side_file(&self, name: &str) -> Option<&SideFile> {
        self.side.iter().find(|f| f.name == name)
    }
}

/// Whether two names have the same numbers in them: a tensor of another layer is no misspelt one of this layer.
fn same_numbers(a: &str, b: &str) -> bool {
    let digits = |c: &char| c.is_ascii_digit();
    a.chars().filter(digits).eq(b.chars().filter(digits))
}

/// A model or adapter as a path: one that exists, else a snapshot of the Hub cache.
fn locate(
    text: &str,
    revision: Option<&str>,
    base_dir: &Path,
    hub: &Hub,
    kind: RepoKind,
) -> Result<hub::Snapshot, CheckpointError> {
    let path = located(text, base_dir);
    match path.metadata() {
        Ok(meta) => {
            if let Some(revision) = revision {
                return Err(CheckpointError::NotFound {
                    path: format!("{}@{revision}", path.display()).into(),
                    hint: format!(
                        "`{}` is a path, which has no revisions; leave `@{revision}` out",
                        path.display()
                    ),
                });
            }
            let is_safetensors = path.extension().is_some_and(|e| e == "safetensors");
            let path = match path.parent() {
                Some(folder) if meta.is_file() && is_safetensors => folder.to_owned(),
                _ => path,
            };
            if meta.is_dir()
                || is_safetensors
                || path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
            {
                return Ok(hub::Snapshot { path, note: None });
            }
            Err(CheckpointError::Unsupported {
                what: "not a model".into(),
                file: path,
                hint: "a source is a folder with `config.json` and safetensors, a `.gguf` file or a Hub name".into(),
            })
        }
        Err(e)
            if e.kind() != std::io::ErrorKind::NotFound
                && e.kind() != std::io::ErrorKind::NotADirectory =>
        {
            Err(CheckpointError::io("opening", &path, e))
        }
        Err(_) if hub::is_name(text) => hub.snapshot(text, revision, kind).map_err(|e| match e {
            CheckpointError::NotFound { path: name, hint } => {
                let near = nearest_sibling(&path)
                    .map(|n| format!("did you mean `{n}`? "))
                    .unwrap_or_default();
                let hint = format!("{near}looked for the path `{}` too: {hint}", path.display());
                CheckpointError::NotFound { path: name, hint }
            }
            other => other,
        }),
        Err(_) => Err(CheckpointError::NotFound { hint: not_found_hint(&path), path }),
    }
}

fn not_found_hint(path: &Path) -> String {
    if let Some(near) = nearest_sibling(path) {
        return format!("did you mean `{near}`?");
    }
    if path.symlink_metadata().is_ok() {
        return "it is a link to nothing".into();
    }
    let parent = path.ancestors().skip(1).find(|p| p.exists() && !p.as_os_str().is_empty());
    match parent {
        Some(parent) => format!(
            "`{}` exists, what follows does not; relative paths start at the recipe's folder, else at the working folder",
            parent.display()
        ),
        None => "relative paths start at the recipe's folder, else at the working folder".into(),
    }
}

/// The entry beside `path` whose name is nearest to it.
fn nearest_sibling(path: &Path) -> Option<String> {
    let (parent, wanted) = (path.parent()?, path.file_name()?.to_str()?);
    let mut names: Vec<String> = std::fs::read_dir(parent)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    let near = file::nearest(wanted, names.iter().map(String::as_str))?;
    Some(parent.join(near).display().to_string())
}

//! Anything that holds a model's weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use crate::config_json::ConfigJson;
use crate::error::CheckpointError;
use crate::shard;
use crate::weight::WeightRef;

/// Where a model is, as a person writes it: `PATH`, `FILE.gguf`, `org/name[@revision]`, any of them `+ADAPTER[@revision]`.
///
/// The text form splits at `+` and `@`; a path that contains either is written as an object in a recipe
/// (`{model: …, lora: …}`), or is recognised because it exists as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceRef {
    /// Folder, GGUF file or Hub name.
    pub model: String,
    /// Hub revision of the model.
    pub revision: Option<String>,
    /// PEFT adapter on top: folder or Hub name.
    pub lora: Option<String>,
    /// Hub revision of the adapter.
    pub lora_revision: Option<String>,
}

impl FromStr for SourceRef {
    type Err = CheckpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (model, lora) = match text.split_once('+') {
            Some((model, lora)) if !Path::new(text).exists() => (model, Some(lora)),
            _ => (text, None),
        };
        let revision = |part: &str| match part.rsplit_once('@') {
            Some((name, revision)) if !Path::new(part).exists() => {
                (name.to_owned(), Some(revision.to_owned()))
            }
            _ => (part.to_owned(), None),
        };
        let (model, model_revision) = revision(model);
        let (lora, lora_revision) = lora.map(revision).unzip();
        Ok(Self { model, revision: model_revision, lora, lora_revision: lora_revision.flatten() })
    }
}

impl std::fmt::Display for SourceRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.model)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(lora) = &self.lora {
            write!(f, "+{lora}")?;
        }
        if let Some(revision) = &self.lora_revision {
            write!(f, "@{revision}")?;
        }
        Ok(())
    }
}

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
    /// Names of tensors that are no floating-point weights, such as position buffers.
    pub other: Vec<String>,
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
];

impl Source {
    /// Opens a model; relative paths are taken from `base_dir`.
    ///
    /// # Errors
    /// [`CheckpointError`] if it is not there, not readable, or not what it should be.
    pub fn open(source: &SourceRef, base_dir: &Path) -> Result<Self, CheckpointError> {
        let path = base_dir.join(&source.model);
        let mut opened = Self::open_folder(&path)?;
        opened.label = source.to_string();
        Ok(opened)
    }

    fn open_folder(path: &Path) -> Result<Self, CheckpointError> {
        let read = |name: &str| -> Result<Vec<u8>, CheckpointError> {
            let file = path.join(name);
            std::fs::read(&file).map_err(|e| CheckpointError::io("reading", &file, e))
        };
        let json = |name: &str, bytes: &[u8]| -> Result<serde_json::Value, CheckpointError> {
            serde_json::from_slice(bytes).map_err(|e| CheckpointError::Malformed {
                what: "file is not JSON".into(),
                file: path.join(name),
                tensor: None,
                expected: "a JSON object".into(),
                found: e.to_string(),
                hint: None,
            })
        };
        let config = match json("config.json", &read("config.json")?)? {
            serde_json::Value::Object(map) => ConfigJson(map),
            _ => ConfigJson::default(),
        };
        let mut files = Vec::new();
        if path.join("model.safetensors.index.json").exists() {
            let index =
                json("model.safetensors.index.json", &read("model.safetensors.index.json")?)?;
            let map = index.get("weight_map").and_then(|m| m.as_object());
            for shard in map.into_iter().flat_map(|m| m.values()).filter_map(|v| v.as_str()) {
                let file = path.join(shard);
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        } else {
            files.push(path.join("model.safetensors"));
        }
        let (mut tensors, mut other) = (BTreeMap::new(), Vec::new());
        for file in &files {
            let shard = shard::open(file)?;
            for (name, weight) in shard.weights {
                tensors.insert(name, Arc::new(weight) as WeightRef);
            }
            other.extend(shard.other);
        }
        let side = SIDE_FILES
            .iter()
            .map(|name| (name, path.join(name)))
            .filter(|(_, file)| file.exists())
            .map(|(name, file)| SideFile {
                name: (*name).to_owned(),
                content: SideContent::File(file),
            })
            .collect();
        Ok(Self {
            label: path.display().to_string(),
            path: path.to_owned(),
            config,
            tensors,
            other,
            files,
            side,
            notes: Vec::new(),
        })
    }

    /// The weight `name`.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], with the nearest name there is.
    pub fn weight(&self, name: &str) -> Result<&WeightRef, CheckpointError> {
        self.tensors.get(name).ok_or_else(|| CheckpointError::MissingTensor {
            file: self.path.clone(),
            tensor: name.to_owned(),
            nearest: None,
        })
    }

    /// The side file `name`, if the model has it.
    pub fn side_file(&self, name: &str) -> Option<&SideFile> {
        self.side.iter().find(|f| f.name == name)
    }
}

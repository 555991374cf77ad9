//! `adapter_model.safetensors`, sorted by module.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_merge_kernels::cast;

use super::keys::{self, Role};
use crate::error::CheckpointError;
use crate::shard;
use crate::weight::{MappedWeight, Weight};

/// A tensor of the file: its key there, and its numbers.
pub(super) type Stored = (String, Arc<MappedWeight>);

/// The tensors of one adapted module.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub a: Option<Stored>,
    pub b: Option<Stored>,
    pub bias_b: Option<Stored>,
    pub embedding_a: Option<Stored>,
    pub embedding_b: Option<Stored>,
    pub magnitude: Option<Stored>,
    pub tokens: Option<Stored>,
}

impl Parts {
    fn slot(&mut self, role: Role) -> Option<&mut Option<Stored>> {
        Some(match role {
            Role::A => &mut self.a,
            Role::B => &mut self.b,
            Role::BiasB => &mut self.bias_b,
            Role::EmbeddingA => &mut self.embedding_a,
            Role::EmbeddingB => &mut self.embedding_b,
            Role::Magnitude => &mut self.magnitude,
            Role::Tokens => &mut self.tokens,
            Role::Full | Role::FullBase => return None,
        })
    }

    /// The keys of all its tensors.
    pub fn keys(&self) -> impl Iterator<Item = &String> {
        [
            &self.a,
            &self.b,
            &self.bias_b,
            &self.embedding_a,
            &self.embedding_b,
            &self.magnitude,
            &self.tokens,
        ]
        .into_iter()
        .flatten()
        .map(|(key, _)| key)
    }
}

/// A tensor that replaces one of the base.
#[derive(Debug)]
pub(super) struct Full {
    /// Its plain name.
    pub tensor: String,
    /// Whether it is stored because its module has a LoRA too.
    pub under_lora: bool,
    pub stored: Stored,
}

/// An adapter's weights.
pub(super) struct AdapterFile {
    pub path: PathBuf,
    pub weights: Vec<Stored>,
    pub modules: BTreeMap<String, Parts>,
    pub full: Vec<Full>,
    /// Keys of no known form, or of no floating-point dtype.
    pub unknown: Vec<String>,
}

impl AdapterFile {
    /// Maps the file of `dir` and sorts its keys.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join("adapter_model.safetensors");
        if !path.exists() {
            return Err(missing(dir, path));
        }
        let shard = shard::open(&path)?;
        let mut weights: Vec<Stored> =
            shard.weights.into_iter().map(|(name, w)| (name, Arc::new(w))).collect();
        weights.sort_by(|a, b| a.0.cmp(&b.0));
        let mut file = Self {
            path,
            weights,
            modules: BTreeMap::new(),
            full: Vec::new(),
            unknown: shard.other,
        };
        for stored in file.weights.clone() {
            file.sort_in(stored)?;
        }
        Ok(file)
    }

    fn sort_in(&mut self, stored: Stored) -> Result<(), CheckpointError> {
        let Some(key) = keys::parse(&stored.0) else {
            self.unknown.push(stored.0);
            return Ok(());
        };
        if matches!(key.role, Role::Full | Role::FullBase) {
            if let Some(twin) = self.full.iter().find(|f| f.tensor == key.module) {
                return Err(self.twice(&twin.stored.0, &stored.0));
            }
            let under_lora = key.role == Role::FullBase;
            self.full.push(Full { tensor: key.module, under_lora, stored });
            return Ok(());
        }
        let parts = self.modules.entry(key.module).or_default();
        let Some(slot) = parts.slot(key.role) else { return Ok(()) };
        if let Some((twin, _)) = slot.take() {
            return Err(self.twice(&twin, &stored.0));
        }
        *slot = Some(stored);
        Ok(())
    }

    fn twice(&self, one: &str, other: &str) -> CheckpointError {
        CheckpointError::Malformed {
            what: "adapter has two tensors for the same place".into(),
            file: self.path.clone(),
            tensor: Some(one.to_owned()),
            expected: "one adapter in the file".into(),
            found: format!("`{other}` as well"),
            hint: Some("save each adapter into a folder of its own".into()),
        }
    }

    /// Refuses NaN and infinity anywhere in the file.
    pub fn check_finite(&self) -> Result<(), CheckpointError> {
        for (name, weight) in &self.weights {
            let bytes = weight.bytes().unwrap_or_default();
            if let Some(index) = cast::first_non_finite(bytes, weight.dtype()) {
                let (file, tensor) = (self.path.clone(), name.clone());
                return Err(CheckpointError::NotFinite { file, tensor, index });
            }
        }
        Ok(())
    }
}

fn missing(dir: &Path, path: PathBuf) -> CheckpointError {
    let pickle = dir.join("adapter_model.bin");
    if pickle.exists() {
        return CheckpointError::Unsupported {
            what: "adapter is stored as a pickle, which can run code when it is read".into(),
            file: pickle,
            hint: "convert it where you trust it: `safetensors.torch.save_file(torch.load(\
                   \"adapter_model.bin\", weights_only=True), \"adapter_model.safetensors\")`"
                .into(),
        };
    }
    CheckpointError::NotFound {
        path,
        hint:
            "a PEFT adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`"
                .into(),
    }
}

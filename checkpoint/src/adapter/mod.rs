//! PEFT LoRA adapters, put on top of an opened model while its weights are read.
//!
//! Nothing is merged on disk or in memory: every weight that the adapter touches is replaced by one that adds the
//! product of the two factors to the rows it is asked for. Formulas and file format are those of PEFT 0.21.

mod config;
mod experts;
mod file;
mod keys;
mod targets;
mod weight;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::CheckpointError;
use crate::source::Source;
use crate::weight::Weight;

use config::AdapterConfig;
use file::AdapterFile;
use targets::Applied;

/// The base's weights with the PEFT adapter of `adapter_dir` on top.
///
/// `W' = W + s·B·A` in `f32`, computed for the rows that are read and rounded once by whoever stores them in the
/// base's dtype; `s = alpha / r`, with rslora `alpha / √r`. Also DoRA, embeddings, expert parameters packed into
/// one tensor, full replacements (`modules_to_save`, biases), `lora_bias` and trained token rows. A scale of zero
/// leaves the weight as it is. The adapter is checked and its numbers looked at once; nothing of the base is
/// read, biases under `lora_bias` excepted.
///
/// What a person should know (a tied head that changes as well, a guess about packed experts) goes to
/// [`Source::notes`], the two files of the adapter to [`Source::files`].
///
/// # Errors
/// [`CheckpointError`] naming file, tensor, expected and found: for an adapter that is no plain LoRA, that was
/// initialised by decomposing its base, whose tensors have other shapes or another vocabulary than the base, whose
/// ranks disagree with its configuration, that has tensors the base has no place for, or that holds NaN or infinity.
///
/// # Source
/// PEFT 0.21 `merge_and_unload`. Differs: fused experts are rounded once, not twice.
pub fn apply(source: Source, adapter_dir: &Path) -> Result<Source, CheckpointError> {
    let config = AdapterConfig::read(adapter_dir)?;
    let file = AdapterFile::open(adapter_dir)?;
    file.check_finite()?;
    let mut applied = Applied::new(source, &config, &file);
    applied.all()?;
    let mut source = applied.finish()?;
    let on_top = format!("+{}", adapter_dir.display());
    if !source.label.ends_with(&on_top) {
        source.label.push_str(&on_top);
    }
    source.files.extend([config.file.clone(), file.path.clone()]);
    Ok(source)
}

/// What an adapter is, from its configuration and the header of its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterInfo {
    /// The folder.
    pub path: PathBuf,
    /// `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// `task_type`.
    pub task_type: Option<String>,
    /// `peft_version`.
    pub peft_version: Option<String>,
    /// `r`, the rank where no pattern says another.
    pub rank: usize,
    /// Every rank that occurs in the file; packed experts count the ranks of all experts together.
    pub ranks: Vec<usize>,
    /// `lora_alpha`, where no pattern says another.
    pub alpha: f64,
    /// `use_rslora`: scale `alpha / √r`.
    pub rslora: bool,
    /// `use_dora`.
    pub dora: bool,
    /// `bias`: `none`, `all` or `lora_only`.
    pub bias: String,
    /// `target_modules`: names, or one regular expression.
    pub target_modules: Vec<String>,
    /// `target_parameters`: packed experts.
    pub target_parameters: Vec<String>,
    /// `modules_to_save`.
    pub modules_to_save: Vec<String>,
    /// Modules with a pair of factors, in the adapter's own names.
    pub modules: Vec<String>,
    /// Tensors that replace one of the base.
    pub replaced: Vec<String>,
    /// Tensors in the file.
    pub tensors: usize,
    /// Numbers in the file.
    pub parameters: u64,
    /// Bytes of these numbers as stored.
    pub bytes: u64,
    /// Dtypes that occur: `f32`, `bf16`, `f16`.
    pub dtypes: Vec<String>,
}

/// Describes the adapter in `dir` without a base.
///
/// # Errors
/// [`CheckpointError`] as [`apply`] has them for the configuration and the file.
pub fn describe(dir: &Path) -> Result<AdapterInfo, CheckpointError> {
    let config = AdapterConfig::read(dir)?;
    let file = AdapterFile::open(dir)?;
    let (mut ranks, mut dtypes) = (BTreeSet::new(), BTreeSet::new());
    let (mut parameters, mut bytes) = (0, 0);
    for (_, weight) in &file.weights {
        let weight: &dyn Weight = weight.as_ref();
        parameters += weight.len() as u64;
        bytes += weight.size_in(weight.dtype());
        dtypes.insert(weight.dtype().to_string());
    }
    let mut modules = Vec::new();
    for (name, parts) in &file.modules {
        if let Some((_, a)) = parts.a.as_ref().or(parts.embedding_a.as_ref()) {
            ranks.extend(a.shape().first());
            modules.push(name.clone());
        }
    }
    Ok(AdapterInfo {
        path: dir.to_owned(),
        rank: config.rank,
        alpha: config.alpha,
        rslora: config.rslora,
        dora: config.dora,
        ranks: ranks.into_iter().collect(),
        modules,
        replaced: file.full.iter().map(|f| f.tensor.clone()).collect(),
        tensors: file.weights.len() + file.unknown.len(),
        parameters,
        bytes,
        dtypes: dtypes.into_iter().collect(),
        bias: config.bias,
        target_modules: config.target_modules,
        target_parameters: config.target_parameters,
        modules_to_save: config.modules_to_save,
        base_model: config.base_model,
        task_type: config.task_type,
        peft_version: config.peft_version,
    })
}

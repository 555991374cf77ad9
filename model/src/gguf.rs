//! A model as a GGUF file for llama.cpp: which of its architectures computes what a [`Spec`] says, and its metadata.
//!
//! The architecture is chosen by arithmetic, not by name: a DeepSeek MoE whose weights of experts are divided by their
//! sum, which llama.cpp's `deepseek` does not do, is written as the architecture that does.
//!
//! # Source
//! llama.cpp `src/models/*.cpp` and `src/llama-model.cpp` (what is read and computed), `conversion/*.py` (what is written).

mod check;
mod rope;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};

use moe_merge_checkpoint::gguf::{
    self, Architecture, GgufPlan, GgufTensor, MetaValue, Metadata, ROPE_FREQS, Storage, TensorPlan,
    key,
};
use moe_merge_checkpoint::{CheckpointError, Explain, Kind, Source};
use moe_merge_kernels::RopePairing;

use crate::error::ModelError;
use crate::spec::{AttentionKind, Mlp, MoeMlp, Spec};

/// Why a model cannot be a GGUF file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// llama.cpp computes something else.
    #[error("llama.cpp cannot run this model: {what}")]
    Lacking {
        /// The family of the model.
        family: &'static str,
        /// llama.cpp's architecture that comes nearest.
        architecture: &'static str,
        /// What it lacks.
        what: String,
        /// What the architecture computes.
        expected: String,
        /// What the model asks for.
        found: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The configuration cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Tensors or tokenizer cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl Explain for GgufError {
    fn kind(&self) -> Kind {
        match self {
            Self::Lacking { .. } => Kind::Input,
            Self::Model(e) => e.kind(),
            Self::Checkpoint(e) => e.kind(),
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Lacking { family, architecture, expected, found, .. } => vec![
                ("family", (*family).into()),
                ("nearest", format!("llama.cpp's architecture `{architecture}`")),
                ("expected", expected.clone()),
                ("found", found.clone()),
            ],
            Self::Model(e) => e.fields(),
            Self::Checkpoint(e) => e.fields(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Lacking { hint, .. } => hint.clone(),
            Self::Model(e) => e.hint(),
            Self::Checkpoint(e) => e.hint(),
        }
    }
}

/// What becomes of the tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vocabulary {
    /// It is carried over; the way in which it cuts words is found out.
    Carried,
    /// It is carried over, with llama.cpp's name for the way in which it cuts words.
    Named(String),
    /// The file has none.
    Absent,
}

/// What to write.
#[derive(Debug)]
pub struct Export {
    /// The architecture that the file names.
    pub architecture: Architecture,
    /// How most numbers of its matrices are stored.
    pub storage: Storage,
    /// The file.
    pub plan: GgufPlan,
    /// What a person should know about it.
    pub notes: Vec<String>,
}

/// Plans the GGUF file of a model: nothing but headers and the tokenizer has been read.
///
/// * `storage`: of matrices; as they are if none
///
/// # Errors
/// [`GgufError`] if no architecture of llama.cpp computes what the model does, a tensor is missing or misshapen, or the
/// tokenizer has no counterpart.
pub fn plan(
    source: &Source,
    storage: Option<Storage>,
    vocabulary: &Vocabulary,
) -> Result<Export, GgufError> {
    let spec = Spec::of(source)?;
    let architecture = check::architecture(&spec)?;
    let mut notes = Vec::new();
    let expected = spec.expected_tensors();
    let tensors = TensorPlan {
        architecture,
        reordered_heads: reordered_heads(&spec, architecture)?,
        storage,
        copy_head: spec.tied && check::ability(architecture).needs_head,
    };
    let (mut tensors, uneven) = tensors.tensors(source, &expected)?;
    if !uneven.is_empty() {
        notes.push(format!(
            "{} tensors whose rows are no multiple of 32 are stored as f16, not q8_0: `{}`{}",
            uneven.len(),
            uneven[0],
            if uneven.len() > 1 { ", …" } else { "" }
        ));
    }
    tensors.extend(extra_tensors(&spec, architecture));
    let used: HashSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let other = source.other.iter().filter(|o| o.bytes().is_some()).map(|o| &o.name);
    let names = source.tensors.keys().chain(other).map(String::as_str);
    let unused: Vec<&str> = names.filter(|name| !used.contains(name)).collect();
    if !unused.is_empty() {
        let more = if unused.len() > 3 { ", …" } else { "" };
        let shown = unused[..unused.len().min(3)].join("`, `");
        notes.push(format!("tensors that the model does not use are left out: `{shown}`{more}"));
    }
    if architecture != check::by_name(&spec) {
        notes.push(format!(
            "written as llama.cpp's architecture `{}`, which weights experts as this model does",
            architecture.name()
        ));
    }
    let main = main_storage(&tensors);
    let mut metadata = general(source, architecture, main);
    metadata.extend(architecture_keys(&spec, architecture, &mut notes)?);
    metadata.extend(match vocabulary {
        Vocabulary::Absent => gguf::no_vocabulary(),
        Vocabulary::Carried => gguf::vocabulary(source, spec.vocab, None, &mut notes)?,
        Vocabulary::Named(pre) => gguf::vocabulary(source, spec.vocab, Some(pre), &mut notes)?,
    });
    Ok(Export { architecture, storage: main, plan: GgufPlan { metadata, tensors }, notes })
}

/// Heads whose rows have to be put in another order: the model rotates halves and llama.cpp neighbours.
fn reordered_heads(
    spec: &Spec,
    architecture: Architecture,
) -> Result<Option<(usize, usize)>, GgufError> {
    let pairing = spec.layers.first().map_or(RopePairing::Halves, |l| l.rope.pairing);
    match (pairing, architecture.rotates_neighbours()) {
        (RopePairing::Halves, true) => Ok(Some((spec.attention.heads, spec.attention.kv_heads))),
        (RopePairing::Interleaved, true) | (RopePairing::Halves, false) => Ok(None),
        (RopePairing::Interleaved, false) => Err(check::lacking(
            spec,
            architecture,
            "it rotates other pairs of dimensions",
            "dimensions (i, i + size / 2)",
            "dimensions (2i, 2i + 1)",
        )),
    }
}

/// Tensors that the Hub's model keeps in its configuration, or does not need.
fn extra_tensors(spec: &Spec, architecture: Architecture) -> Vec<GgufTensor> {
    let mut extra = Vec::new();
    if let Some(factors) = spec.layers.first().and_then(|l| rope::factors(&l.rope)) {
        extra.push(gguf::extra_vector(ROPE_FREQS, &factors));
    }
    if architecture == Architecture::Ernie4_5Moe {
        for (layer, moe) in spec.moe_layers().filter(|(_, m)| m.selection_bias.is_none()) {
            // Not needed by llama.cpp, but by everything that reads the file as an Ernie.
            let name = format!("blk.{layer}.exp_probs_b.bias");
            extra.push(gguf::extra_vector(&name, &vec![0.0; moe.experts]));
        }
    }
    extra
}

/// How most bytes of matrices are stored.
fn main_storage(tensors: &[GgufTensor]) -> Storage {
    let mut bytes = BTreeMap::new();
    for tensor in tensors.iter().filter(|t| t.shape.len() > 1) {
        *bytes.entry(tensor.storage).or_insert(0u64) += tensor.size();
    }
    bytes.into_iter().max_by_key(|(_, b)| *b).map_or(Storage::F32, |(storage, _)| storage)
}

fn general(source: &Source, architecture: Architecture, main: Storage) -> Metadata {
    let name = source.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let text = |text: &str| MetaValue::Text(text.to_owned());
    vec![
        (key::ARCHITECTURE.into(), text(architecture.name())),
        ("general.type".into(), text("model")),
        ("general.name".into(), text(&name)),
        (key::FILE_TYPE.into(), MetaValue::U32(main.file_type())),
        ("general.quantization_version".into(), MetaValue::U32(2)),
    ]
}

/// Collects the keys of an architecture.
struct Keys {
    prefix: &'static str,
    list: Metadata,
}

impl Keys {
    fn count(&mut self, key: &str, value: usize) {
        // Sizes come from configurations of models that fit in memory.
        let value = u32::try_from(value).unwrap_or(u32::MAX);
        self.list.push((format!("{}.{key}", self.prefix), MetaValue::U32(value)));
    }

    fn number(&mut self, key: &str, value: f32) {
        self.list.push((format!("{}.{key}", self.prefix), MetaValue::F32(value)));
    }

    fn put(&mut self, key: &str, value: MetaValue) {
        self.list.push((format!("{}.{key}", self.prefix), value));
    }
}

fn architecture_keys(
    spec: &Spec,
    architecture: Architecture,
    notes: &mut Vec<String>,
) -> Result<Metadata, GgufError> {
    let mut keys = Keys { prefix: architecture.name(), list: Vec::new() };
    keys.count(key::VOCAB_SIZE, spec.vocab);
    keys.count(key::BLOCK_COUNT, spec.layers.len());
    keys.count(key::EMBEDDING_LENGTH, spec.hidden);
    keys.count(key::FEED_FORWARD_LENGTH, feed_forward(spec));
    windows(spec, architecture, &mut keys, notes);
    attention(spec, architecture, &mut keys);
    rope::keys(spec, architecture, &mut keys)?;
    if let Some((_, moe)) = spec.moe_layers().next() {
        experts(spec, moe, architecture, &mut keys);
    }
    if architecture == Architecture::GraniteMoe {
        keys.number(key::LOGIT_SCALE, spec.logits_divisor);
        keys.number(key::ATTENTION_SCALE, spec.attention.scale);
        // llama.cpp leaves out what is zero; one changes nothing.
        keys.number(key::RESIDUAL_SCALE, spec.residual_scale);
        keys.number(key::EMBEDDING_SCALE, spec.embedding_scale);
    }
    Ok(keys.list)
}

/// Width of the dense MLPs; of an expert where there are none.
fn feed_forward(spec: &Spec) -> usize {
    let dense = spec.layers.iter().find_map(|layer| match &layer.mlp {
        Mlp::Dense(mlp) => Some(mlp.inter),
        Mlp::Moe(_) => None,
    });
    dense.or_else(|| spec.moe_layers().next().map(|(_, moe)| moe.inter)).unwrap_or(0)
}

/// The context, and the windows where llama.cpp has them; elsewhere the context ends where they would begin to count.
fn windows(spec: &Spec, architecture: Architecture, keys: &mut Keys, notes: &mut Vec<String>) {
    let window = spec.layers.iter().filter_map(|l| l.window).min();
    if architecture.is_gemma() {
        keys.count(key::CONTEXT_LENGTH, spec.max_positions);
        keys.count(key::SLIDING_WINDOW, window.unwrap_or(spec.max_positions));
        let found: Vec<bool> = spec.layers.iter().map(|l| l.window.is_some()).collect();
        let period = if architecture == Architecture::Gemma2 { 2 } else { 6 };
        let by_default = (0..found.len()).map(|l| l % period < period - 1);
        if !by_default.eq(found.iter().copied()) {
            keys.put(key::SLIDING_PATTERN, MetaValue::Bools(found));
        }
        return;
    }
    let context = window.map_or(spec.max_positions, |w| w.min(spec.max_positions));
    keys.count(key::CONTEXT_LENGTH, context);
    if let Some(window) = window.filter(|w| *w < spec.max_positions) {
        notes.push(format!(
            "llama.cpp's `{}` has no sliding window: up to the window of {window} tokens the results are the same, so that is \
             the context length of the file (the model's is {})",
            architecture.name(),
            spec.max_positions
        ));
    }
    if let (Some(window), Architecture::Llama | Architecture::Phi3) = (window, architecture) {
        keys.count(key::SLIDING_WINDOW, window);
    }
}

fn attention(spec: &Spec, architecture: Architecture, keys: &mut Keys) {
    let attention = &spec.attention;
    keys.count(key::HEADS, attention.heads);
    keys.count(key::KV_HEADS, attention.kv_heads);
    keys.count(key::KEY_LENGTH, attention.qk_dim());
    keys.count(key::VALUE_LENGTH, attention.v_dim());
    keys.number(key::RMS_EPS, spec.eps);
    if let AttentionKind::Latent { q_rank, kv_rank, .. } = attention.kind {
        keys.count(key::Q_LORA_RANK, q_rank.unwrap_or(0));
        keys.count(key::KV_LORA_RANK, kv_rank);
    }
    if let Some(cap) = attention.softcap {
        keys.number(key::ATTENTION_SOFTCAP, cap);
    }
    if let Some(cap) = spec.final_softcap.filter(|_| architecture.is_gemma()) {
        keys.number(key::FINAL_SOFTCAP, cap);
    }
}

fn experts(spec: &Spec, moe: &MoeMlp, architecture: Architecture, keys: &mut Keys) {
    use Architecture::*;
    keys.count(key::EXPERTS, moe.experts);
    keys.count(key::EXPERTS_USED, moe.router.top_k);
    let has_own_length =
        matches!(architecture, Qwen2Moe | Qwen3Moe | Deepseek | Deepseek2 | Ernie4_5Moe);
    if has_own_length {
        keys.count(key::EXPERT_LENGTH, moe.inter);
    }
    let shared = moe.shared.as_ref().map_or(0, |s| s.inter);
    if matches!(architecture, Qwen2Moe | Ernie4_5Moe | GraniteMoe) {
        keys.count(key::SHARED_LENGTH, shared);
    }
    if matches!(architecture, Deepseek | Deepseek2 | Ernie4_5Moe) {
        keys.count(key::EXPERTS_SHARED, shared / moe.inter.max(1));
        let leading = spec.moe_layers().next().map_or(0, |(layer, _)| layer);
        keys.count(key::LEADING_DENSE, leading);
    }
    if architecture == Ernie4_5Moe {
        keys.count(key::MOE_STEP, 1);
    }
    if matches!(architecture, Deepseek | Deepseek2) {
        keys.number(key::EXPERT_WEIGHTS_SCALE, moe.router.scale);
    }
    if architecture == Deepseek2 {
        // Softmax.
        keys.count(key::EXPERT_GATING, 1);
    }
    keys.put(key::EXPERT_WEIGHTS_NORM, MetaValue::Bool(moe.router.renormalise));
}

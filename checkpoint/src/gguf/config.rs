//! `config.json` from GGUF metadata.
//!
//! # Source
//! llama.cpp `gguf-py/gguf/constants.py` (keys) and `convert_hf_to_gguf.py` (what is written into them); transformers
//! `integrations/ggml.py` (names on the other side).

use std::collections::BTreeMap;

use moe_merge_kernels::{Dtype, cast};
use serde_json::{Map, Value as Json, json};

use crate::config_json::ConfigJson;
use crate::error::CheckpointError;
use crate::gguf::header::Header;
use crate::gguf::key;
use crate::gguf::kinds::TensorKind;
use crate::gguf::rope;
use crate::gguf::table::Architecture;
use crate::gguf::value::Value;
use crate::map::MappedFile;
use crate::weight::WeightRef;

/// Metadata of one architecture.
pub(super) struct Meta<'h> {
    pub header: &'h Header<'h>,
    pub file: &'h MappedFile,
    pub architecture: Architecture,
    /// What its keys start with: `general.architecture`.
    prefix: &'h str,
}

impl<'h> Meta<'h> {
    pub(super) fn new(
        header: &'h Header<'h>,
        file: &'h MappedFile,
    ) -> Result<Self, CheckpointError> {
        let Some(Value::Text(prefix)) = header.get(key::ARCHITECTURE) else {
            let found = header.get(key::ARCHITECTURE).map_or("nothing".into(), Value::describe);
            return Err(malformed(file, "general.architecture", "a text", found));
        };
        match Architecture::from_name(prefix) {
            Some(architecture) => Ok(Self { header, file, architecture, prefix }),
            None => Err(CheckpointError::Unsupported {
                what: format!("GGUF architecture `{prefix}` is not supported"),
                file: file.path().to_owned(),
                hint: format!("known: {}; or use the safetensors files", Architecture::known()),
            }),
        }
    }

    /// The value of a key of this architecture.
    pub(super) fn get(&self, key: &str) -> Option<&Value<'h>> {
        self.header.get(&format!("{}.{key}", self.prefix))
    }

    /// A count that is there in some files; lists count if all their values are equal.
    pub(super) fn optional(&self, key: &str) -> Option<usize> {
        match self.get(key)? {
            Value::List(list) => {
                let mut numbers = list.numbers()?;
                let first = numbers.next()?;
                let same = numbers.all(|n| n == first) && first >= 0.0 && first.fract() == 0.0;
                same.then_some(first as usize)
            }
            value => usize::try_from(value.unsigned()?).ok(),
        }
    }

    /// A count that has to be there and above zero.
    pub(super) fn required(&self, key: &str) -> Result<usize, CheckpointError> {
        match self.optional(key) {
            Some(count) if (1..=u32::MAX as usize).contains(&count) => Ok(count),
            _ => {
                let found = self.get(key).map_or("nothing".into(), Value::describe);
                let key = format!("{}.{key}", self.prefix);
                Err(malformed(self.file, &key, "a count above zero, the same in all layers", found))
            }
        }
    }

    pub(super) fn heads(&self) -> Result<usize, CheckpointError> {
        self.required(key::HEADS)
    }

    pub(super) fn kv_heads(&self) -> Result<usize, CheckpointError> {
        match self.get(key::KV_HEADS) {
            Some(_) => self.required(key::KV_HEADS),
            None => self.heads(),
        }
    }

    /// A number, as the shortest decimal that gives it back.
    pub(super) fn number(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::F32(v) => Some(shortest(*v)),
            Value::F64(v) => Some(*v),
            value => value.unsigned().map(|v| v as f64),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// A list of truth values, one for each layer.
    pub(super) fn flags(&self, key: &str) -> Option<Vec<bool>> {
        match self.get(key)? {
            Value::List(list) => {
                let flags: Vec<bool> = list.numbers()?.map(|n| n != 0.0).collect();
                (Some(flags.len()) == self.optional(key::BLOCK_COUNT)).then_some(flags)
            }
            _ => None,
        }
    }

    pub(super) fn text(&self, key: &str) -> Option<&'h str> {
        match self.get(key)? {
            Value::Text(v) => Some(v),
            _ => None,
        }
    }

    /// All values of a small tensor of the configuration, such as rope factors.
    pub(super) fn table(&self, name: &str) -> Option<Vec<f32>> {
        let tensor = self.header.tensor(name)?;
        let dtype = match tensor.kind {
            TensorKind::F32 => Dtype::F32,
            TensorKind::F16 => Dtype::F16,
            TensorKind::BF16 => Dtype::BF16,
            _ => return None,
        };
        let mut values = vec![0.0; tensor.shape.iter().product()];
        cast::widen(&self.file.bytes()[tensor.range.clone()], dtype, &mut values);
        Some(values)
    }

    /// Size of one attention head.
    pub(super) fn head_dim(&self) -> Result<usize, CheckpointError> {
        let heads = self.heads()?;
        use Architecture::*;
        let rotary = || match self.architecture {
            Llama | Deepseek | Ernie4_5Moe | GraniteMoe => self.optional(key::ROPE_DIM),
            _ => None,
        };
        match self.optional(key::KEY_LENGTH).or_else(rotary) {
            Some(dim) => Ok(dim),
            None => Ok(self.required(key::EMBEDDING_LENGTH)? / heads),
        }
    }
}

fn malformed(file: &MappedFile, key: &str, expected: &str, found: String) -> CheckpointError {
    CheckpointError::Malformed {
        what: format!("metadata key `{key}` is missing or makes no sense"),
        file: file.path().to_owned(),
        tensor: None,
        expected: expected.into(),
        found,
        hint: Some("convert the model again with a current llama.cpp".into()),
    }
}

/// `1e-5` for the `f32` nearest to it, not `0.000009999999747378752`.
pub(super) fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// The configuration of the model that the file was converted from.
pub(super) fn config_json(
    header: &Header,
    file: &MappedFile,
    tensors: &BTreeMap<String, WeightRef>,
    notes: &mut Vec<String>,
) -> Result<ConfigJson, CheckpointError> {
    let meta = Meta::new(header, file)?;
    let mut config = Map::new();
    let mut set = |key: &str, value: Json| {
        config.insert(key.to_owned(), value);
    };
    let (class, model_type) = class_and_type(&meta);
    set("architectures", json!([class]));
    set("model_type", json!(model_type));
    set("vocab_size", json!(vocab_size(&meta, tensors)?));
    set("hidden_size", json!(meta.required(key::EMBEDDING_LENGTH)?));
    set("intermediate_size", json!(intermediate_size(&meta)?));
    set("num_hidden_layers", json!(meta.required(key::BLOCK_COUNT)?));
    set("num_attention_heads", json!(meta.heads()?));
    set("num_key_value_heads", json!(meta.kv_heads()?));
    let gelu = "gelu_pytorch_tanh";
    match meta.architecture.is_gemma() {
        true => {
            set("hidden_act", json!(gelu));
            set("hidden_activation", json!(gelu));
        }
        false => set("hidden_act", json!("silu")),
    }
    set("max_position_embeddings", json!(meta.required(key::CONTEXT_LENGTH)?));
    let Some(eps) = meta.number(key::RMS_EPS) else {
        let key = format!("{}.attention.layer_norm_rms_epsilon", meta.prefix);
        return Err(malformed(file, &key, "a number", "nothing".into()));
    };
    set("rms_norm_eps", json!(eps));
    set("rope_theta", json!(meta.number(key::ROPE_BASE).unwrap_or(10000.0)));
    if let Some(scaling) = rope::scaling(&meta, notes)? {
        set("rope_scaling", scaling);
    }
    family(&meta, tensors, &mut set, notes)?;
    set("tie_word_embeddings", json!(!tensors.contains_key("lm_head.weight")));
    for (key, from) in TOKEN_IDS {
        if let Some(id) = header.get(from).and_then(Value::unsigned) {
            set(key, json!(id));
        }
    }
    set("torch_dtype", json!(main_dtype(header).config_name()));
    Ok(ConfigJson(config))
}

/// Keys of token ids in `config.json`, and where the file has them.
const TOKEN_IDS: [(&str, &str); 3] = [
    ("bos_token_id", "tokenizer.ggml.bos_token_id"),
    ("eos_token_id", "tokenizer.ggml.eos_token_id"),
    ("pad_token_id", "tokenizer.ggml.padding_token_id"),
];

fn class_and_type(meta: &Meta) -> (&'static str, &'static str) {
    let experts = meta.optional(key::EXPERTS).unwrap_or(0) > 0;
    let window = meta.optional(key::SLIDING_WINDOW).unwrap_or(0) > 0;
    match meta.architecture {
        Architecture::Llama if experts => ("MixtralForCausalLM", "mixtral"),
        Architecture::Llama if window => ("MistralForCausalLM", "mistral"),
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Architecture::Qwen2Moe => ("Qwen2MoeForCausalLM", "qwen2_moe"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        Architecture::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe"),
        Architecture::Phi3 => ("Phi3ForCausalLM", "phi3"),
        Architecture::Gemma2 => ("Gemma2ForCausalLM", "gemma2"),
        Architecture::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text"),
        Architecture::Olmoe => ("OlmoeForCausalLM", "olmoe"),
        Architecture::Deepseek => ("DeepseekForCausalLM", "deepseek"),
        Architecture::Deepseek2 => ("DeepseekV2ForCausalLM", "deepseek_v2"),
        Architecture::Ernie4_5Moe => ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
        Architecture::GraniteMoe => ("GraniteMoeSharedForCausalLM", "granitemoeshared"),
    }
}

/// Rows of the embedding; the tokenizer may have fewer tokens.
fn vocab_size(
    meta: &Meta,
    tensors: &BTreeMap<String, WeightRef>,
) -> Result<usize, CheckpointError> {
    let Some(embedding) = tensors.get("model.embed_tokens.weight") else {
        return Err(CheckpointError::MissingTensor {
            file: meta.file.path().to_owned(),
            tensor: "token_embd.weight".into(),
            nearest: None,
        });
    };
    let hidden = meta.required(key::EMBEDDING_LENGTH)?;
    let rows = embedding.rows();
    embedding.expect_shape(&[rows, hidden], "vocabulary, embedding_length of the metadata")?;
    Ok(rows)
}

/// Size of the dense MLP; files of MoE models without one may leave it out.
fn intermediate_size(meta: &Meta) -> Result<usize, CheckpointError> {
    match meta.optional(key::FEED_FORWARD_LENGTH) {
        Some(size) if size > 0 => Ok(size),
        _ if meta.optional(key::EXPERT_LENGTH).is_some() => meta.required(key::EXPERT_LENGTH),
        _ => meta.required(key::FEED_FORWARD_LENGTH),
    }
}

/// The dtype of most values, with quantised ones taken as f32.
fn main_dtype(header: &Header) -> Dtype {
    let mut values = BTreeMap::new();
    for tensor in header.tensors.iter().filter(|t| t.shape.len() > 1) {
        let dtype = match tensor.kind {
            TensorKind::F16 => Dtype::F16,
            TensorKind::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        };
        *values.entry(dtype).or_insert(0u128) += tensor.shape.iter().product::<usize>() as u128;
    }
    values.into_iter().max_by_key(|(_, count)| *count).map_or(Dtype::F32, |(dtype, _)| dtype)
}

/// What one family has and others do not.
fn family(
    meta: &Meta,
    tensors: &BTreeMap<String, WeightRef>,
    set: &mut impl FnMut(&str, Json),
    notes: &mut Vec<String>,
) -> Result<(), CheckpointError> {
    let layer_has = |name: &str| tensors.contains_key(&format!("model.layers.0.{name}"));
    if !matches!(meta.architecture, Architecture::Deepseek2) {
        set("head_dim", json!(meta.head_dim()?));
    }
    let window = meta.optional(key::SLIDING_WINDOW).filter(|w| *w > 0);
    match meta.architecture {
        Architecture::Llama => {
            if let Some(window) = window {
                set("sliding_window", json!(window));
            }
            if meta.optional(key::EXPERTS).unwrap_or(0) > 0 {
                set("num_local_experts", json!(meta.required(key::EXPERTS)?));
                set("num_experts_per_tok", json!(meta.required(key::EXPERTS_USED)?));
            } else {
                set("attention_bias", json!(layer_has("self_attn.q_proj.bias")));
                set("mlp_bias", json!(layer_has("mlp.up_proj.bias")));
            }
        }
        Architecture::Qwen2 => set("use_sliding_window", json!(false)),
        Architecture::Qwen3 => {
            set("attention_bias", json!(layer_has("self_attn.q_proj.bias")));
            set("use_sliding_window", json!(false));
        }
        Architecture::Qwen2Moe | Architecture::Qwen3Moe | Architecture::Olmoe => moe(meta, set)?,
        Architecture::Phi3 => {
            let (rotary, size) = (meta.optional(key::ROPE_DIM), meta.head_dim()?);
            if let Some(rotary) = rotary.filter(|rotary| *rotary != size) {
                set("partial_rotary_factor", json!(rotary as f64 / size as f64));
            }
            if let Some(length) = meta.optional(key::ROPE_SCALING_ORIGINAL) {
                set("original_max_position_embeddings", json!(length));
            }
            set("sliding_window", window.map_or(Json::Null, |w| json!(w)));
        }
        Architecture::Gemma2 | Architecture::Gemma3 => gemma(meta, window, set, notes)?,
        Architecture::Deepseek => {
            set("attention_bias", json!(layer_has("self_attn.q_proj.bias")));
            deepseek_experts(meta, set)?;
        }
        Architecture::Deepseek2 => deepseek(meta, set)?,
        Architecture::Ernie4_5Moe => ernie(meta, tensors, set)?,
        Architecture::GraniteMoe => {
            set("attention_bias", json!(layer_has("self_attn.q_proj.bias")));
            granite(meta, set)?;
        }
    }
    Ok(())
}

fn ernie(
    meta: &Meta,
    tensors: &BTreeMap<String, WeightRef>,
    set: &mut impl FnMut(&str, Json),
) -> Result<(), CheckpointError> {
    let inter = meta.required(key::EXPERT_LENGTH)?;
    let step = meta.optional(key::MOE_STEP).unwrap_or(1);
    if step != 1 {
        return Err(CheckpointError::Unsupported {
            what: format!("GGUF file has experts in every layer number {step} only"),
            file: meta.file.path().to_owned(),
            hint: "use the safetensors files of this model".into(),
        });
    }
    // The key for the width of the shared experts is not reliable in converted files; the tensor is.
    let shared =
        tensors.iter().find(|(name, _)| name.ends_with(".mlp.shared_experts.up_proj.weight"));
    set("moe_num_experts", json!(meta.required(key::EXPERTS)?));
    set("moe_k", json!(meta.required(key::EXPERTS_USED)?));
    set("moe_intermediate_size", json!(inter));
    set("moe_num_shared_experts", json!(shared.map_or(0, |(_, w)| w.rows() / inter)));
    set("moe_layer_start_index", json!(meta.optional(key::LEADING_DENSE).unwrap_or(0)));
    set("moe_layer_end_index", json!(meta.required(key::BLOCK_COUNT)? - 1));
    set("moe_layer_interval", json!(1));
    set("moe_norm_min", json!(1e-12));
    set("use_bias", json!(false));
    Ok(())
}

fn granite(meta: &Meta, set: &mut impl FnMut(&str, Json)) -> Result<(), CheckpointError> {
    set("num_local_experts", json!(meta.required(key::EXPERTS)?));
    set("num_experts_per_tok", json!(meta.required(key::EXPERTS_USED)?));
    set("shared_intermediate_size", json!(meta.optional(key::SHARED_LENGTH).unwrap_or(0)));
    let head_dim = meta.head_dim()? as f64;
    // llama.cpp takes a scale of zero for none.
    let scale = |key: &str| meta.number(key).filter(|v| *v != 0.0);
    let attention = scale(key::ATTENTION_SCALE).unwrap_or(1.0 / head_dim.sqrt());
    set("attention_multiplier", json!(attention));
    set("embedding_multiplier", json!(scale(key::EMBEDDING_SCALE).unwrap_or(1.0)));
    set("residual_multiplier", json!(scale(key::RESIDUAL_SCALE).unwrap_or(1.0)));
    set("logits_scaling", json!(scale(key::LOGIT_SCALE).unwrap_or(1.0)));
    Ok(())
}

/// Routed and shared experts in DeepSeek's words.
fn deepseek_experts(meta: &Meta, set: &mut impl FnMut(&str, Json)) -> Result<(), CheckpointError> {
    set("n_routed_experts", json!(meta.required(key::EXPERTS)?));
    set("num_experts_per_tok", json!(meta.required(key::EXPERTS_USED)?));
    set("n_shared_experts", json!(meta.optional(key::EXPERTS_SHARED)));
    set("moe_intermediate_size", json!(meta.required(key::EXPERT_LENGTH)?));
    set("first_k_dense_replace", json!(meta.optional(key::LEADING_DENSE).unwrap_or(0)));
    set("moe_layer_freq", json!(1));
    // A scale of zero is none, as llama.cpp reads it.
    let scale = meta.number(key::EXPERT_WEIGHTS_SCALE).filter(|v| *v != 0.0).unwrap_or(1.0);
    set("routed_scaling_factor", json!(scale));
    if meta.architecture == Architecture::Deepseek && scale != 1.0 {
        return Err(CheckpointError::Unsupported {
            what: format!("GGUF file scales the weights of experts by {scale}"),
            file: meta.file.path().to_owned(),
            hint: "use the safetensors files of this model".into(),
        });
    }
    set("norm_topk_prob", json!(meta.flag(key::EXPERT_WEIGHTS_NORM).unwrap_or(false)));
    set("scoring_func", json!("softmax"));
    Ok(())
}

fn moe(meta: &Meta, set: &mut impl FnMut(&str, Json)) -> Result<(), CheckpointError> {
    set("num_experts", json!(meta.required(key::EXPERTS)?));
    set("num_experts_per_tok", json!(meta.required(key::EXPERTS_USED)?));
    // llama.cpp renormalises the weights of the chosen experts for Qwen3-MoE and not for the two others.
    let normalised = meta.architecture == Architecture::Qwen3Moe;
    set("norm_topk_prob", json!(meta.flag(key::EXPERT_WEIGHTS_NORM).unwrap_or(normalised)));
    if meta.architecture == Architecture::Olmoe {
        if let Some(clip) = meta.number(key::CLAMP_KQV) {
            set("clip_qkv", json!(clip));
        }
        return Ok(());
    }
    set("moe_intermediate_size", json!(meta.required(key::EXPERT_LENGTH)?));
    if meta.architecture == Architecture::Qwen2Moe {
        let key = key::SHARED_LENGTH;
        set("shared_expert_intermediate_size", json!(meta.required(key)?));
    }
    set("decoder_sparse_step", json!(1));
    set("mlp_only_layers", json!([]));
    Ok(())
}

/// Layers of the 27-billion models, which scale attention by `hidden_size / heads` and not by the size of a head;
/// llama.cpp tells them by this number as well.
const GEMMA2_27B_LAYERS: usize = 46;
const GEMMA3_27B_LAYERS: usize = 62;

fn gemma(
    meta: &Meta,
    window: Option<usize>,
    set: &mut impl FnMut(&str, Json),
    notes: &mut Vec<String>,
) -> Result<(), CheckpointError> {
    let large = match meta.architecture {
        Architecture::Gemma2 => GEMMA2_27B_LAYERS,
        _ => GEMMA3_27B_LAYERS,
    };
    let scalar = match meta.required(key::BLOCK_COUNT)? == large {
        true => meta.required(key::EMBEDDING_LENGTH)? / meta.heads()?,
        false => meta.head_dim()?,
    };
    set("query_pre_attn_scalar", json!(scalar));
    notes.push(format!(
        "`query_pre_attn_scalar` is not in GGUF metadata; taken as {scalar}, as llama.cpp does"
    ));
    if let Some(window) = window {
        set("sliding_window", json!(window));
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        set(key, meta.number(key).map_or(Json::Null, |v| json!(v)));
    }
    if let Some(sliding) = meta.flags(key::SLIDING_PATTERN) {
        let kind = |sliding: &bool| match sliding {
            true => "sliding_attention",
            false => "full_attention",
        };
        set("layer_types", json!(sliding.iter().map(kind).collect::<Vec<_>>()));
    }
    if meta.architecture == Architecture::Gemma3 {
        let local = meta.number(key::ROPE_BASE_LOCAL).unwrap_or(10000.0);
        set("rope_local_base_freq", json!(local));
        let pattern = match meta.get(key::SLIDING_PATTERN) {
            Some(value) => value.unsigned().filter(|n| *n > 0).unwrap_or(6),
            None => 6,
        };
        set("sliding_window_pattern", json!(pattern));
    }
    Ok(())
}

fn deepseek(meta: &Meta, set: &mut impl FnMut(&str, Json)) -> Result<(), CheckpointError> {
    if meta.header.tensor("blk.0.attn_k_b.weight").is_some() {
        return Err(CheckpointError::Unsupported {
            what: "GGUF file has the latent attention split into `attn_k_b` and `attn_v_b`".into(),
            file: meta.file.path().to_owned(),
            hint: "use the safetensors files of this model".into(),
        });
    }
    let rotary = meta.required(key::ROPE_DIM)?;
    let key_length = meta.required(key::KEY_LENGTH)?;
    if let Some(rank) = meta.optional(key::Q_LORA_RANK) {
        set("q_lora_rank", json!(rank));
    } else {
        set("q_lora_rank", Json::Null);
    }
    set("kv_lora_rank", json!(meta.required(key::KV_LORA_RANK)?));
    set("qk_rope_head_dim", json!(rotary));
    set("qk_nope_head_dim", json!(key_length.saturating_sub(rotary)));
    set("v_head_dim", json!(meta.required(key::VALUE_LENGTH)?));
    set("head_dim", json!(rotary));
    deepseek_experts(meta, set)?;
    let groups = meta.optional(key::EXPERT_GROUPS).unwrap_or(1);
    if groups > 1 || meta.optional(key::EXPERT_GATING) == Some(2) {
        return Err(CheckpointError::Unsupported {
            what: "GGUF file routes experts by groups or by sigmoid, as DeepSeek-V3 does".into(),
            file: meta.file.path().to_owned(),
            hint: "use the safetensors files of this model".into(),
        });
    }
    set("topk_method", json!("greedy"));
    set("n_group", json!(1));
    set("topk_group", json!(1));
    set("attention_bias", json!(false));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_write_them() {
        assert_eq!(shortest(1e-5), 1e-5);
        assert_eq!(shortest(500000.0), 500000.0);
        assert_eq!(shortest(0.1), 0.1);
    }
}

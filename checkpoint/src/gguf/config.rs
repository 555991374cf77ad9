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
use crate::gguf::kinds::TensorKind;
use crate::gguf::names::Architecture;
use crate::gguf::rope;
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
        let Some(Value::Text(prefix)) = header.get("general.architecture") else {
            let found =
                header.get("general.architecture").map_or("nothing".into(), Value::describe);
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
        self.required("attention.head_count")
    }

    pub(super) fn kv_heads(&self) -> Result<usize, CheckpointError> {
        match self.get("attention.head_count_kv") {
            Some(_) => self.required("attention.head_count_kv"),
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
        let rotary = || match self.architecture {
            Architecture::Llama => self.optional("rope.dimension_count"),
            _ => None,
        };
        match self.optional("attention.key_length").or_else(rotary) {
            Some(dim) => Ok(dim),
            None => Ok(self.required("embedding_length")? / heads),
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
    set("hidden_size", json!(meta.required("embedding_length")?));
    set("intermediate_size", json!(intermediate_size(&meta)?));
    set("num_hidden_layers", json!(meta.required("block_count")?));
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
    set("max_position_embeddings", json!(meta.required("context_length")?));
    let Some(eps) = meta.number("attention.layer_norm_rms_epsilon") else {
        let key = format!("{}.attention.layer_norm_rms_epsilon", meta.prefix);
        return Err(malformed(file, &key, "a number", "nothing".into()));
    };
    set("rms_norm_eps", json!(eps));
    set("rope_theta", json!(meta.number("rope.freq_base").unwrap_or(10000.0)));
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
    let experts = meta.optional("expert_count").unwrap_or(0) > 0;
    let window = meta.optional("attention.sliding_window").unwrap_or(0) > 0;
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
        Architecture::Deepseek2 => ("DeepseekV2ForCausalLM", "deepseek_v2"),
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
    let hidden = meta.required("embedding_length")?;
    let rows = embedding.rows();
    embedding.expect_shape(&[rows, hidden], "vocabulary, embedding_length of the metadata")?;
    Ok(rows)
}

/// Size of the dense MLP; files of MoE models without one may leave it out.
fn intermediate_size(meta: &Meta) -> Result<usize, CheckpointError> {
    match meta.optional("feed_forward_length") {
        Some(size) if size > 0 => Ok(size),
        _ if meta.optional("expert_feed_forward_length").is_some() => {
            meta.required("expert_feed_forward_length")
        }
        _ => meta.required("feed_forward_length"),
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
    let window = meta.optional("attention.sliding_window").filter(|w| *w > 0);
    match meta.architecture {
        Architecture::Llama => {
            if let Some(window) = window {
                set("sliding_window", json!(window));
            }
            if meta.optional("expert_count").unwrap_or(0) > 0 {
                set("num_local_experts", json!(meta.required("expert_count")?));
                set("num_experts_per_tok", json!(meta.required("expert_used_count")?));
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
            let (rotary, size) = (meta.optional("rope.dimension_count"), meta.head_dim()?);
            if let Some(rotary) = rotary.filter(|rotary| *rotary != size) {
                set("partial_rotary_factor", json!(rotary as f64 / size as f64));
            }
            if let Some(length) = meta.optional("rope.scaling.original_context_length") {
                set("original_max_position_embeddings", json!(length));
            }
            set("sliding_window", window.map_or(Json::Null, |w| json!(w)));
        }
        Architecture::Gemma2 | Architecture::Gemma3 => gemma(meta, window, set, notes)?,
        Architecture::Deepseek2 => deepseek(meta, set)?,
    }
    Ok(())
}

fn moe(meta: &Meta, set: &mut impl FnMut(&str, Json)) -> Result<(), CheckpointError> {
    set("num_experts", json!(meta.required("expert_count")?));
    set("num_experts_per_tok", json!(meta.required("expert_used_count")?));
    // llama.cpp renormalises the weights of the chosen experts for Qwen3-MoE and not for the two others.
    let normalised = meta.architecture == Architecture::Qwen3Moe;
    set("norm_topk_prob", json!(meta.flag("expert_weights_norm").unwrap_or(normalised)));
    if meta.architecture == Architecture::Olmoe {
        if let Some(clip) = meta.number("attention.clamp_kqv") {
            set("clip_qkv", json!(clip));
        }
        return Ok(());
    }
    set("moe_intermediate_size", json!(meta.required("expert_feed_forward_length")?));
    if meta.architecture == Architecture::Qwen2Moe {
        let key = "expert_shared_feed_forward_length";
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
    let scalar = match meta.required("block_count")? == large {
        true => meta.required("embedding_length")? / meta.heads()?,
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
    if meta.architecture == Architecture::Gemma3 {
        let local = meta.number("rope.freq_base_swa").unwrap_or(10000.0);
        set("rope_local_base_freq", json!(local));
        set("sliding_window_pattern", json!(6));
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
    let rotary = meta.required("rope.dimension_count")?;
    let key_length = meta.required("attention.key_length")?;
    if let Some(rank) = meta.optional("attention.q_lora_rank") {
        set("q_lora_rank", json!(rank));
    } else {
        set("q_lora_rank", Json::Null);
    }
    set("kv_lora_rank", json!(meta.required("attention.kv_lora_rank")?));
    set("qk_rope_head_dim", json!(rotary));
    set("qk_nope_head_dim", json!(key_length.saturating_sub(rotary)));
    set("v_head_dim", json!(meta.required("attention.value_length")?));
    set("head_dim", json!(rotary));
    set("n_routed_experts", json!(meta.required("expert_count")?));
    set("num_experts_per_tok", json!(meta.required("expert_used_count")?));
    set("n_shared_experts", json!(meta.optional("expert_shared_count")));
    set("moe_intermediate_size", json!(meta.required("expert_feed_forward_length")?));
    set("first_k_dense_replace", json!(meta.optional("leading_dense_block_count").unwrap_or(0)));
    set("moe_layer_freq", json!(1));
    set("routed_scaling_factor", json!(meta.number("expert_weights_scale").unwrap_or(1.0)));
    set("norm_topk_prob", json!(meta.flag("expert_weights_norm").unwrap_or(false)));
    let groups = meta.optional("expert_group_count").unwrap_or(1);
    if groups > 1 || meta.optional("expert_gating_func") == Some(2) {
        return Err(CheckpointError::Unsupported {
            what: "GGUF file routes experts by groups or by sigmoid, as DeepSeek-V3 does".into(),
            file: meta.file.path().to_owned(),
            hint: "use the safetensors files of this model".into(),
        });
    }
    set("scoring_func", json!("softmax"));
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

//! `config.json` and `generation_config.json` of an output, in both spellings that transformers has used.

use moe_merge_checkpoint::{ConfigJson, Dtype};
use serde_json::{Map, Value, json};

use crate::families::{OutputFamily, Shape};

/// The version that outputs name: one of 4.x, which keeps old loaders quiet and which 5.x reads.
pub const TRANSFORMERS_VERSION: &str = "4.57.6";

/// Rotary base that llama, mistral, qwen2 and qwen3 have where their configuration is silent.
const DEFAULT_THETA: f64 = 10_000.0;

/// Keys of dense configurations that mean nothing, or something else, in a MoE.
const DROPPED: &[&str] = &[
    "_name_or_path",
    "auto_map",
    "architectures",
    "model_type",
    "layer_types",
    "max_window_layers",
    "mlp_bias",
    "no_rope_layers",
    "pretraining_tp",
    "quantization_config",
    "sliding_window",
    "use_sliding_window",
];

/// The configuration of a MoE: what the base says, without what does not belong, and the family's keys. Keys are sorted, as
/// transformers writes them.
pub fn moe_config(
    base: &ConfigJson,
    family: &dyn OutputFamily,
    shape: &Shape,
    dtype: Dtype,
) -> Map<String, Value> {
    let mut config = base.0.clone();
    for key in DROPPED {
        config.remove(*key);
    }
    config.insert("architectures".into(), json!([family.class()]));
    config.insert("model_type".into(), json!(family.name()));
    config.insert("output_router_logits".into(), json!(false));
    config.insert("router_aux_loss_coef".into(), json!(0.001));
    config.insert("hidden_act".into(), json!(base.str("hidden_act").unwrap_or("silu")));
    config.insert("intermediate_size".into(), json!(shape.dims.intermediate));
    config.insert("num_key_value_heads".into(), json!(shape.dims.kv_heads));
    family.configure(&mut config, shape);
    let tied = base.bool("tie_word_embeddings").unwrap_or(false);
    config.insert("tie_word_embeddings".into(), json!(tied));
    rotary(base, &mut config);
    dtype_and_version(&mut config, Some(dtype));
    sorted(config)
}

/// The configuration of a dense output: the base's, in both spellings. Where it is silent, loaders have the defaults of its
/// family, which differ.
pub fn dense_config(base: &ConfigJson, dtype: Option<Dtype>) -> Map<String, Value> {
    let mut config = base.0.clone();
    config.remove("_name_or_path");
    config.remove("quantization_config");
    if base.f64("rope_theta").is_some() || base.at("rope_parameters.rope_theta").is_some() {
        rotary(base, &mut config);
    }
    dtype_and_version(&mut config, dtype.or(base.dtype()));
    sorted(config)
}

fn sorted(config: Map<String, Value>) -> Map<String, Value> {
    let mut entries: Vec<(String, Value)> = config.into_iter().collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    entries.into_iter().collect()
}

/// Rotary settings, as 4.x and 5.x look for them.
fn rotary(base: &ConfigJson, config: &mut Map<String, Value>) {
    // gemma3 keeps one set of rotary settings per kind of layer, models of several parts one per part: there is nothing to
    // spell twice.
    let nested = base
        .get("rope_parameters")
        .and_then(Value::as_object)
        .is_some_and(|p| p.values().any(Value::is_object));
    if nested || base.several_parts() {
        return;
    }
    let rope = rope_parameters(base);
    let mut scaling = rope.clone();
    let theta = scaling.remove("rope_theta").unwrap_or(json!(DEFAULT_THETA));
    let plain = scaling.get("rope_type").and_then(Value::as_str) == Some("default");
    config.insert("rope_theta".into(), theta);
    let scaling = if plain { Value::Null } else { Value::Object(scaling) };
    config.insert("rope_scaling".into(), scaling);
    config.insert("rope_parameters".into(), Value::Object(rope));
}

/// The dtype, in both spellings, and the version.
fn dtype_and_version(config: &mut Map<String, Value>, dtype: Option<Dtype>) {
    if let Some(dtype) = dtype {
        config.insert("dtype".into(), json!(dtype.config_name()));
        config.insert("torch_dtype".into(), json!(dtype.config_name()));
    }
    config.insert("transformers_version".into(), json!(TRANSFORMERS_VERSION));
}

/// Rotary settings as 5.x spells them: `rope_theta`, `rope_type` and what belongs to the type, sorted.
pub fn rope_parameters(config: &ConfigJson) -> Map<String, Value> {
    let object = |key: &str| config.get(key).and_then(Value::as_object).cloned();
    let mut rope = object("rope_parameters").or_else(|| object("rope_scaling")).unwrap_or_default();
    let kind = rope.remove("type");
    if !rope.contains_key("rope_type") {
        rope.insert("rope_type".into(), kind.unwrap_or(json!("default")));
    }
    if !rope.contains_key("rope_theta") {
        let theta = config.f64("rope_theta").unwrap_or(DEFAULT_THETA);
        rope.insert("rope_theta".into(), json!(theta));
    }
    sorted(rope)
}

/// The generation settings where the base has none of its own: its special tokens.
pub fn generation_config(base: &ConfigJson) -> Map<String, Value> {
    let mut config = Map::new();
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(id) = base.get(key) {
            config.insert(key.into(), id.clone());
        }
    }
    config.insert("transformers_version".into(), json!(TRANSFORMERS_VERSION));
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(value: Value) -> ConfigJson {
        ConfigJson(value.as_object().unwrap().clone())
    }

    #[test]
    fn both_spellings_of_rope_say_the_same() {
        let llama3 = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"});
        let mut new = llama3.clone();
        new["rope_theta"] = json!(5e5);
        let old = config(json!({"rope_theta": 5e5, "rope_scaling": llama3}));
        let new = config(json!({"rope_parameters": new}));
        let (from_old, from_new) = (dense_config(&old, None), dense_config(&new, None));
        assert_eq!(from_old, from_new);
        assert_eq!(from_old["rope_theta"], 5e5);
        assert_eq!(from_old["rope_scaling"]["rope_type"], "llama3");
        assert_eq!(from_old["rope_scaling"].get("rope_theta"), None);
        assert_eq!(from_old["rope_parameters"]["rope_theta"], 5e5);
    }

    #[test]
    fn plain_rope_and_the_older_key_for_its_type() {
        let out = dense_config(&config(json!({"rope_theta": 1e6})), Some(Dtype::BF16));
        assert_eq!(out["rope_scaling"], Value::Null);
        assert_eq!(out["rope_parameters"], json!({"rope_theta": 1e6, "rope_type": "default"}));
        assert_eq!((&out["dtype"], &out["torch_dtype"]), (&json!("bfloat16"), &json!("bfloat16")));
        let parts = json!({"vision_config": {}, "rope_scaling": {"type": "mrope"}});
        let out = dense_config(&config(parts), None);
        assert_eq!(
            (&out["rope_scaling"]["type"], out.get("rope_parameters")),
            (&json!("mrope"), None)
        );
        let scaled = json!({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}});
        let out = dense_config(&config(scaled), None);
        assert_eq!(out["rope_scaling"], json!({"factor": 2.0, "rope_type": "linear"}));
    }

    #[test]
    fn where_a_dense_model_is_silent_its_family_speaks() {
        // gemma2 ties its head, smollm3 has another rotary base: their files name neither.
        let scaling = json!({"type": "linear", "factor": 2.0});
        let out = dense_config(&config(json!({"rope_scaling": scaling})), None);
        assert_eq!(out["rope_scaling"], scaling);
        for key in ["tie_word_embeddings", "rope_theta", "rope_parameters"] {
            assert_eq!(out.get(key), None, "{key}");
        }
    }
}

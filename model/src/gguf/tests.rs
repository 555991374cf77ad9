use serde_json::{Value, json};

use super::*;

use moe_merge_checkpoint::ConfigJson;

/// A tiny llama with changes.
fn spec(changes: Value) -> Spec {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    Spec::from_config(&ConfigJson(config.as_object().unwrap().clone())).unwrap()
}

fn keys(changes: Value) -> Result<(Metadata, Vec<String>), GgufError> {
    let (spec, mut notes) = (spec(changes), Vec::new());
    let architecture = check::architecture(&spec)?;
    reordered_heads(&spec, architecture)?;
    Ok((architecture_keys(&spec, architecture, &mut notes)?, notes))
}

#[test]
fn what_llama_cpp_lacks_is_named() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0});
    let latent = json!({
        "model_type": "deepseek_v2", "n_routed_experts": 4, "n_shared_experts": 1,
        "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 16,
        "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
    });
    let gemma = json!({"model_type": "gemma2", "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0, "tie_word_embeddings": true});
    for (config, what) in [
        (json!({"model_type": "qwen3", "rope_scaling": llama3}), "as Llama 3 does"),
        (json!({"model_type": "qwen2", "head_dim": 32}), "its heads are"),
        (json!({"rope_scaling": yarn}), "the usual numbers"),
        (json!({"partial_rotary_factor": 0.5}), "whole heads"),
        (json!({"model_type": "qwen3_moe", "norm_topk_prob": false}), "weights the experts"),
        (
            json!({"model_type": "qwen3_moe", "norm_topk_prob": true, "mlp_only_layers": [1]}),
            "other layers",
        ),
        (
            json!({"model_type": "olmoe", "num_key_value_heads": 4, "clip_qkv": 8.0}),
            "does not clamp",
        ),
        (json!({"model_type": "mixtral", "num_experts": 600}), "fewer experts"),
        (
            json!({"model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "use_bias": true}),
            "no bias on the output",
        ),
        (latent, "chooses experts in another way"),
        (gemma, "always caps"),
    ] {
        let error = keys(config.clone()).expect_err(&config.to_string());
        let GgufError::Lacking { what: found, .. } = &error else { panic!("{error:?}") };
        assert!(found.contains(what), "{found}, not {what}");
        let labels: Vec<&str> = error.fields().iter().map(|(label, _)| *label).collect();
        assert_eq!(labels, ["family", "nearest", "expected", "found"]);
    }
}

#[test]
fn a_window_ends_the_context() {
    let (metadata, notes) = keys(json!({"model_type": "mistral", "sliding_window": 100})).unwrap();
    let value = |key: &str| &metadata.iter().find(|(k, _)| k == key).unwrap().1;
    assert_eq!(value("llama.context_length"), &MetaValue::U32(100));
    assert_eq!(value("llama.attention.sliding_window"), &MetaValue::U32(100));
    assert!(notes[0].contains("window of 100 tokens"), "{notes:?}");
    // A window that is never reached is none.
    let (metadata, notes) = keys(json!({"model_type": "mistral", "sliding_window": 4096})).unwrap();
    let context = metadata.iter().find(|(k, _)| k == "llama.context_length").unwrap();
    assert_eq!((&context.1, notes.len()), (&MetaValue::U32(256), 0));
}

#[test]
fn a_deepseek_is_what_it_computes() {
    let architecture = |norm: bool, shared: usize, dense: usize| {
        let spec = spec(json!({
            "model_type": "deepseek", "n_routed_experts": 4, "norm_topk_prob": norm,
            "n_shared_experts": shared, "first_k_dense_replace": dense,
        }));
        check::architecture(&spec).map(Architecture::name).map_err(|e| e.to_string())
    };
    assert_eq!(architecture(false, 1, 1), Ok("deepseek"));
    assert_eq!(architecture(true, 1, 0), Ok("granitemoe"));
    assert_eq!(architecture(true, 1, 1), Ok("ernie4_5-moe"));
    assert_eq!(architecture(true, 0, 0), Ok("llama"));
    assert!(architecture(false, 0, 0).is_err());
}

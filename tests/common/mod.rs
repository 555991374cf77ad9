//! What the end-to-end tests share. Each of them uses its part.
#![allow(dead_code)]

pub mod layouts;

use std::path::{Path, PathBuf};

use moe_merge_checkpoint::publish::{Interrupt, Replace};
use moe_merge_checkpoint::{ConfigJson, Source, SourceRef};
use moe_merge_merge::build::{BuildOptions, Observer, Prepared, RecipeText, Stage};
use moe_merge_merge::families::Layout;
use moe_merge_merge::recipe::{self, Recipe};
use moe_merge_model::{Cache, LogitRows, Model, Spec};
use serde_json::{Value, json};

/// Nobody watches.
pub struct Silent;

impl Observer for Silent {
    fn stage(&self, _: Stage, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// Builds a MoE recipe file into `out`.
pub fn build(recipe: &Path, out: &Path) -> PathBuf {
    build_text(&std::fs::read_to_string(recipe).unwrap(), recipe, out, Layout::Hub)
}

/// Builds a MoE recipe that stands at `path` (which need not exist) into `out`.
pub fn build_text(text: &str, path: &Path, out: &Path, layout: Layout) -> PathBuf {
    let recipe = match recipe::parse(text, path) {
        Ok(Recipe::Moe(recipe)) => recipe,
        other => panic!("{}: {other:?}", path.display()),
    };
    let options = BuildOptions {
        out: Some(out.to_owned()),
        unfinished: Default::default(),
        replace: Replace::Never,
        layout,
        interrupt: Interrupt::default(),
        placement: Default::default(),
        shard_limit: None,
    };
    let prepared = Prepared::new(&recipe, RecipeText { path, text }, options);
    let built = prepared.and_then(|p| p.build(&Silent));
    built.unwrap_or_else(|e| panic!("{}: {e:?}", path.display())).output
}

/// Opens a folder.
pub fn open(path: &Path) -> Source {
    let reference = SourceRef {
        model: path.display().to_string(),
        revision: None,
        lora: None,
        lora_revision: None,
    };
    Source::open(&reference, Path::new("")).unwrap()
}

/// Logits of all positions.
pub fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let mut cache = Cache::new(model, tokens.len());
    model.forward(tokens, &mut cache, LogitRows::All).unwrap()
}

/// A copy of the quickstart's base below `temp`, whose files can be changed.
pub fn copy_of_base(temp: &Path) -> PathBuf {
    let (from, to) = (moe_merge_testkit::repository("recipes/quickstart/base"), temp.join("base"));
    std::fs::create_dir(&to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    to
}

/// The same with a SentencePiece tokenizer instead of its own.
pub fn with_sentence_piece(temp: &Path) -> PathBuf {
    let folder = copy_of_base(temp);
    let spm = moe_merge_testkit::repository("checkpoint/tests/data/spm.gguf");
    for side in open(&spm).side {
        std::fs::write(folder.join(&side.name), side.read().unwrap()).unwrap();
    }
    folder
}

/// A small model with made-up weights in `folder`: `changes` on top of the configuration of a tiny llama.
pub fn made_up(folder: &Path, changes: &Value) -> Source {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "float32",
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let config = ConfigJson(config.as_object().unwrap().clone());
    let spec = Spec::from_config(&config).unwrap();
    let mut state = 1u32;
    let mut random = move || {
        // Numerical Recipes' generator: enough for weights that differ.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = spec
        .expected_tensors()
        .into_iter()
        .map(|(name, shape)| {
            let norm = name.ends_with("norm.weight");
            let (middle, width) = match norm {
                true => (1.0 - spec.norm_offset, 0.2),
                false => (0.0, 1.5 / (*shape.last().unwrap() as f32).sqrt()),
            };
            let count = shape.iter().product();
            let values = (0..count).flat_map(|_| (middle + width * random()).to_le_bytes());
            let values = values.collect();
            (name, shape, values)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
        (name, view)
    });
    std::fs::create_dir_all(folder).unwrap();
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
    let text = Value::Object(config.0).to_string();
    std::fs::write(folder.join("config.json"), text).unwrap();
    open(folder)
}

/// Features that no checkpoint of the reference data has: name, configuration, llama.cpp's architecture.
pub fn made_up_cases() -> Vec<(&'static str, Value, &'static str)> {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    let with = |mut scaling: Value, key: &str, value: Value| {
        scaling[key] = value;
        scaling
    };
    let deepseek = |extra: Value| {
        let mut config = json!({
            "model_type": "deepseek", "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1,
        });
        for (key, value) in extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    };
    let latent = json!({
        "model_type": "deepseek_v2", "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24,
        "v_head_dim": 16, "routed_scaling_factor": 2.5, "topk_method": "greedy",
    });
    let mscale = with(with(yarn.clone(), "mscale", json!(0.7)), "mscale_all_dim", json!(0.7));
    let gemma = json!({
        "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
        "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "tie_word_embeddings": true,
    });
    vec![
        ("llama_linear", json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}), "llama"),
        ("llama_yarn", json!({"rope_scaling": yarn}), "llama"),
        (
            "llama_yarn_factor",
            json!({"rope_scaling": with(yarn.clone(), "attention_factor", json!(1.5))}),
            "llama",
        ),
        ("llama_mlp_bias", json!({"mlp_bias": true, "attention_bias": true}), "llama"),
        (
            "mixtral_head_dim",
            json!({"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 3,
                   "head_dim": 32, "tie_word_embeddings": true}),
            "llama",
        ),
        (
            "olmoe",
            json!({"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2,
                   "num_key_value_heads": 4, "tie_word_embeddings": true}),
            "olmoe",
        ),
        (
            "qwen3_yarn",
            json!({"model_type": "qwen3", "head_dim": 32, "rope_scaling": yarn}),
            "qwen3",
        ),
        (
            "phi3_partial",
            json!({"model_type": "phi3", "partial_rotary_factor": 0.5,
                   "original_max_position_embeddings": 256}),
            "phi3",
        ),
        ("gemma3_pattern", gemma, "gemma3"),
        ("deepseek", deepseek(json!({})), "deepseek"),
        ("deepseek_norm_dense", deepseek(json!({"norm_topk_prob": true})), "ernie4_5-moe"),
        (
            "deepseek_norm_plain",
            deepseek(
                json!({"norm_topk_prob": true, "n_shared_experts": 0, "first_k_dense_replace": 0}),
            ),
            "llama",
        ),
        ("deepseek_v2_yarn", with(latent, "rope_scaling", mscale), "deepseek2"),
        (
            "ernie_dense_first",
            json!({"model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2,
                   "moe_intermediate_size": 32, "moe_num_shared_experts": 1,
                   "moe_layer_start_index": 1, "tie_word_embeddings": true}),
            "ernie4_5-moe",
        ),
        (
            "granite_multipliers",
            json!({"model_type": "granitemoeshared", "num_local_experts": 4, "num_experts_per_tok": 2,
                   "shared_intermediate_size": 48, "embedding_multiplier": 6.0,
                   "residual_multiplier": 0.25, "attention_multiplier": 0.125, "logits_scaling": 4.0}),
            "granitemoe",
        ),
    ]
}

//! What can stand for a model in a recipe, and what the keys of an expert do to its tensors.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use moe_merge_checkpoint::Source;
use moe_merge_merge::families::Layout;
use moe_merge_testkit::repository;
use safetensors::tensor::TensorView;

const UP: &str = "mlp.up_proj.weight";
const EXPERT_UP: &str = "w3.weight";

fn quickstart(name: &str) -> String {
    repository("recipes/quickstart").join(name).display().to_string()
}

/// Builds a recipe with these experts (YAML lines) and further keys.
fn build(temp: &Path, experts: &str, keys: &str) -> Source {
    let text = format!(
        "base_model: {}\ngate_mode: random\ndtype: float32\n{keys}\nexperts:\n{experts}",
        quickstart("base")
    );
    let out = temp.join("out");
    common::open(&common::build_text(&text, &temp.join("recipe.yaml"), &out, Layout::Hub))
}

fn values(source: &Source, name: &str) -> Vec<f32> {
    source.weight(name).unwrap().to_f32().unwrap()
}

fn dense(name: &str, tensor: &str) -> Vec<f32> {
    values(&common::open(&repository("recipes/quickstart").join(name)), tensor)
}

fn expert(layer: usize, expert: usize) -> String {
    format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{EXPERT_UP}")
}

fn up(layer: usize) -> String {
    format!("model.layers.{layer}.{UP}")
}

#[test]
fn outside_its_layers_an_expert_is_the_base() {
    let temp = tempfile::tempdir().unwrap();
    let experts = format!(
        "  - {{source_model: {}, layers: [1, 3]}}\n  - {{source_model: {}}}\n",
        quickstart("code"),
        quickstart("prose")
    );
    let moe = build(temp.path(), &experts, "");
    for layer in 0..6 {
        let owner = if (1..3).contains(&layer) { "code" } else { "base" };
        assert_eq!(values(&moe, &expert(layer, 0)), dense(owner, &up(layer)), "layer {layer}");
        assert_eq!(values(&moe, &expert(layer, 1)), dense("prose", &up(layer)));
    }
}

#[test]
fn residual_scale_multiplies_the_down_projection_alone() {
    let temp = tempfile::tempdir().unwrap();
    let experts = format!(
        "  - {{source_model: {}, residual_scale: 0.25}}\n  - {{source_model: {}}}\n",
        quickstart("code"),
        quickstart("prose")
    );
    let moe = build(temp.path(), &experts, "");
    assert_eq!(values(&moe, &expert(0, 0)), dense("code", &up(0)));
    let down = values(&moe, "model.layers.0.block_sparse_moe.experts.0.w2.weight");
    let plain = dense("code", "model.layers.0.mlp.down_proj.weight");
    assert!(down.iter().zip(&plain).all(|(d, p)| *d == 0.25 * p));
}

#[test]
fn noise_has_the_scale_asked_for_and_the_seed_decides() {
    let experts = |scale: f32| {
        format!(
            "  - {{source_model: {}, noise_scale: {scale}}}\n  - {{source_model: {}}}\n",
            quickstart("code"),
            quickstart("prose")
        )
    };
    let noisy = |keys: &str| {
        let temp = tempfile::tempdir().unwrap();
        values(&build(temp.path(), &experts(0.01), keys), &expert(0, 0))
    };
    let (a, b, plain) = (noisy("seed: 1"), noisy("seed: 2"), dense("code", &up(0)));
    assert_ne!(a, b);
    assert_eq!(a, noisy("seed: 1"));
    let square: f64 = a.iter().zip(&plain).map(|(a, p)| f64::from(a - p).powi(2)).sum();
    let deviation = (square / a.len() as f64).sqrt();
    // 44 032 numbers: the deviation is known to about 0.4 %.
    assert!((deviation / 0.01 - 1.0).abs() < 0.02, "{deviation}");
}

#[test]
fn a_nested_recipe_is_a_source() {
    let temp = tempfile::tempdir().unwrap();
    let soup = format!(
        "merge_method: linear\ndtype: float32\nmodels:\n  - {{model: {}, parameters: {{weight: 1}}}}\n  - {{model: {}, parameters: {{weight: 3}}}}\n",
        quickstart("code"),
        quickstart("math")
    );
    std::fs::write(temp.path().join("soup.yaml"), soup).unwrap();
    let experts = format!(
        "  - {{source_model: soup.yaml, name: soup}}\n  - {{source_model: {}}}\n",
        quickstart("prose")
    );
    let moe = build(temp.path(), &experts, "");
    let (code, math) = (dense("code", &up(2)), dense("math", &up(2)));
    for ((found, c), m) in values(&moe, &expert(2, 0)).iter().zip(&code).zip(&math) {
        assert!((found - (c + 3.0 * m) / 4.0).abs() <= 1e-6, "{found} {c} {m}");
    }
}

#[test]
fn attention_can_be_the_average_of_the_experts() {
    let temp = tempfile::tempdir().unwrap();
    // The experts' attention is the base's own, so the average has to give that back.
    let experts = format!(
        "  - {{source_model: {}}}\n  - {{source_model: {}}}\n",
        quickstart("code"),
        quickstart("prose")
    );
    let moe = build(temp.path(), &experts, "attention: average");
    let name = "model.layers.3.self_attn.q_proj.weight";
    let (code, prose) = (dense("code", name), dense("prose", name));
    for ((found, c), p) in values(&moe, name).iter().zip(&code).zip(&prose) {
        assert!((found - (c + p) / 2.0).abs() <= 1e-6);
    }
}

/// A LoRA of rank 1 on one projection, in PEFT's format.
fn write_adapter(dir: &Path, a: &[f32], b: &[f32]) {
    std::fs::create_dir_all(dir).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["up_proj"]}"#;
    std::fs::write(dir.join("adapter_config.json"), config).unwrap();
    let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let (a_bytes, b_bytes) = (bytes(a), bytes(b));
    let prefix = "base_model.model.model.layers.4.mlp.up_proj";
    let mut tensors = BTreeMap::new();
    let view = |bytes, shape: [usize; 2]| {
        TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap()
    };
    tensors.insert(format!("{prefix}.lora_A.weight"), view(&a_bytes, [1, a.len()]));
    tensors.insert(format!("{prefix}.lora_B.weight"), view(&b_bytes, [b.len(), 1]));
    let file = dir.join("adapter_model.safetensors");
    std::fs::write(file, safetensors::serialize(&tensors, None).unwrap()).unwrap();
}

#[test]
fn an_adapter_on_the_base_is_an_expert() {
    let temp = tempfile::tempdir().unwrap();
    let a: Vec<f32> = (0..128).map(|i| (i as f32 * 0.37).sin() * 0.1).collect();
    let b: Vec<f32> = (0..344).map(|i| (i as f32 * 0.11).cos() * 0.1).collect();
    write_adapter(&temp.path().join("adapter"), &a, &b);
    let base = quickstart("base");
    let forms = [
        format!("  - {{source_model: '{base}+adapter', name: x}}\n  - {{source_model: {base}}}\n"),
        format!(
            "  - {{source_model: {{model: {base}, lora: adapter}}, name: x}}\n  - {{source_model: {base}}}\n"
        ),
    ];
    for experts in forms {
        let moe = build(temp.path(), &experts, "");
        let plain = dense("base", &up(4));
        let changed = values(&moe, &expert(4, 0));
        for (i, (found, p)) in changed.iter().zip(&plain).enumerate() {
            // alpha / r = 2
            let expected = p + 2.0 * b[i / 128] * a[i % 128];
            assert!((found - expected).abs() <= 1e-6, "{i}: {found} {expected}");
        }
        assert_eq!(values(&moe, &expert(3, 0)), dense("base", &up(3)));
        assert_eq!(values(&moe, &expert(4, 1)), plain);
        std::fs::remove_dir_all(temp.path().join("out")).unwrap();
    }
}

#[test]
fn a_gguf_file_is_a_source() {
    let temp = tempfile::tempdir().unwrap();
    let gguf = repository("checkpoint/tests/data/tiny.gguf").display().to_string();
    let text = format!(
        "base_model: {gguf}\ndtype: float32\nallow_identical_experts: true\nexperts:\n  \
         - {{source_model: {gguf}, name: a, positive_prompts: ['the boat was frozen']}}\n  \
         - {{source_model: {gguf}, name: b, positive_prompts: ['let mut end = entry;']}}\n"
    );
    let out = temp.path().join("out");
    let moe = common::build_text(&text, &temp.path().join("r.yaml"), &out, Layout::Hub);
    let (moe, dense) = (common::open(&moe), common::open(Path::new(&gguf)));
    for name in ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"] {
        assert_eq!(values(&moe, name), values(&dense, name));
    }
    assert_eq!(values(&moe, &expert(1, 1)), values(&dense, &up(1)));
    assert!(out.join("tokenizer.json").exists());
}

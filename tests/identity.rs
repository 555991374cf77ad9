//! One model repeated as every expert is that model, whatever the router does.

mod common;

use moe_merge_merge::families::Layout;
use moe_merge_model::Model;
use moe_merge_testkit::{golden, repository, shared};

const TOKENS: &[u32] = &[1, 17, 250, 33, 98, 511, 4, 5, 600, 77, 1000, 12];

/// A recipe with `experts` times the same model.
fn recipe(base: &str, family: &str, experts: usize, top_k: usize, shared: usize) -> String {
    let mut text = format!(
        "base_model: {base}\narchitecture: {family}\ngate_mode: random\nseed: 3\nexperts_per_token: {top_k}\n\
         dtype: float32\nallow_identical_experts: true\nexperts:\n"
    );
    (0..experts).for_each(|i| text += &format!("  - {{source_model: {base}, name: e{i}}}\n"));
    if shared > 0 {
        text += "shared_experts:\n";
        (0..shared)
            .for_each(|_| text += &format!("  - {{source_model: {base}, residual_scale: 0.0}}\n"));
    }
    text
}

fn check(base: &std::path::Path, family: &str, shared: usize) {
    let dense = Model::open(&common::open(base)).unwrap();
    let expected: Vec<f64> = common::logits(&dense, TOKENS).iter().map(|&v| f64::from(v)).collect();
    let temp = tempfile::tempdir().unwrap();
    for (experts, top_k) in [(2, 1), (3, 2), (5, 5)] {
        for layout in [Layout::Hub, Layout::Fused] {
            let text = recipe(&base.display().to_string(), family, experts, top_k, shared);
            let out = temp.path().join(format!("{experts}-{top_k}-{layout:?}"));
            // The one has no loader for a fused layout, the other knows no layout but its own stacked one.
            if layout == Layout::Fused && ["deepseek", "granitemoeshared"].contains(&family) {
                continue;
            }
            common::build_text(&text, &temp.path().join("recipe.yaml"), &out, layout);
            let moe = Model::open(&common::open(&out)).unwrap();
            let found = common::logits(&moe, TOKENS);
            let difference = golden::relative_difference(&found, &expected);
            assert!(difference < 2e-5, "{family} {experts}/{top_k} {layout:?}: {difference}");
        }
    }
}

#[test]
fn mixtral_from_llama() {
    check(&repository("recipes/quickstart/base"), "mixtral", 0);
}

#[test]
fn deepseek_from_llama() {
    check(&repository("recipes/quickstart/base"), "deepseek", 0);
    check(&repository("recipes/quickstart/base"), "deepseek", 2);
}

#[test]
fn ernie_from_llama() {
    check(&repository("recipes/quickstart/base"), "ernie4_5_moe", 0);
    check(&repository("recipes/quickstart/base"), "ernie4_5_moe", 3);
}

#[test]
fn granite_from_llama() {
    check(&repository("recipes/quickstart/base"), "granitemoeshared", 0);
    check(&repository("recipes/quickstart/base"), "granitemoeshared", 2);
}

#[test]
fn qwen2_moe_from_llama() {
    check(&repository("recipes/quickstart/base"), "qwen2_moe", 1);
}

#[test]
fn families_of_other_bases() {
    let cases = [
        ("mistral", "mixtral", 0),
        ("qwen2", "qwen2_moe", 1),
        ("qwen3", "qwen3_moe", 0),
        ("mistral", "ernie4_5_moe", 1),
    ];
    for (base, family, shared_experts) in cases {
        let Some(base) = shared(&format!("golden/moe/{base}/base")) else { return };
        check(&base, family, shared_experts);
    }
}

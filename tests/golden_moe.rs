//! mergekit-moe recipes, unchanged, against the gates and logits that mergekit and transformers computed.

mod common;

use std::sync::Arc;

use moe_merge_checkpoint::Dtype;
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_kernels::{Exec, Isa};
use moe_merge_testkit::golden::{self, GATE_COSINE, LOGITS_F32};
use moe_merge_testkit::{repository, shared};

/// Every recipe below `golden/moe`, and the name of the router of a layer.
const CASES: &[(&str, &str)] = &[
    ("mixtral_hidden", "block_sparse_moe.gate"),
    ("mixtral_hidden_negative", "block_sparse_moe.gate"),
    ("mixtral_hidden_avg", "block_sparse_moe.gate"),
    ("mixtral_hidden_last", "block_sparse_moe.gate"),
    ("mixtral_cheap_embed", "block_sparse_moe.gate"),
    ("mixtral_from_mistral", "block_sparse_moe.gate"),
    ("qwen2_moe_hidden", "mlp.gate"),
    ("qwen2_moe_from_llama", "mlp.gate"),
    ("qwen3_moe_hidden", "mlp.gate"),
    ("deepseek_hidden", "mlp.gate"),
    ("deepseek_shared", "mlp.gate"),
];

#[test]
fn every_recipe_is_listed() {
    let Some(dir) = shared("golden/moe") else { return };
    let mut found: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .filter_map(|e| {
            e.unwrap().file_name().into_string().unwrap().strip_suffix(".yaml").map(str::to_owned)
        })
        .collect();
    found.sort();
    let mut listed: Vec<&str> = CASES.iter().map(|(name, _)| *name).collect();
    listed.sort_unstable();
    assert_eq!(found, listed);
}

#[test]
fn gates_and_logits_are_those_of_mergekit() {
    let Some(dir) = shared("golden/moe") else { return };
    let temp = tempfile::tempdir().unwrap();
    for (case, router) in CASES {
        let expected = golden::load(&dir.join(format!("{case}.expected.safetensors")));
        let output = common::build(&dir.join(format!("{case}.yaml")), &temp.path().join(case));
        let mut source = common::open(&output);
        let (mut gates, mut theirs) = (0, Vec::new());
        for (name, gate) in &expected {
            let (layer, tensor) = match name.split_once("gate_") {
                Some(("", layer)) => (layer, (*router).to_owned()),
                Some(("shared_", layer)) => (layer, "mlp.shared_expert_gate".to_owned()),
                _ => continue,
            };
            let tensor = format!("model.layers.{layer}.{tensor}.weight");
            let found = source.weight(&tensor).unwrap();
            let values = found.to_f32().unwrap();
            assert_eq!(found.shape(), gate.shape, "{case} {name}");
            for expert in 0..gate.shape[0] {
                let width = gate.shape[1];
                let row = &values[expert * width..(expert + 1) * width];
                let cosine = golden::cosine(row, gate.row(expert));
                // Here the reference's own bf16 shows: see `qwen_gates_are_exact_in_f32`.
                let bound = if QWEN.contains(case) { QWEN_BF16 } else { GATE_COSINE };
                assert!(cosine >= bound, "{case} {name} expert {expert}: cosine {cosine}");
            }
            let values: Vec<f32> = gate.values.iter().map(|&v| v as f32).collect();
            theirs.push((tensor, (values, gate.shape.clone())));
            gates += 1;
        }
        assert!(gates >= 3, "{case}: {gates} gates compared");
        let (Some(ids), Some(logits)) = (expected.get("input_ids"), expected.get("logits")) else {
            assert!(case.starts_with("deepseek"), "{case} has no logits");
            continue;
        };
        // With our own gates, then with mergekit's, which it rounds to bf16: the latter has to agree to rounding in f32.
        let ours = moe_merge_model::Model::open(&source).unwrap();
        for (name, values) in theirs {
            let weight = OwnedWeight::from_f32(&name, &values.0, &values.1, Dtype::F32);
            source.tensors.insert(name, Arc::new(weight));
        }
        let sets: Vec<Exec> = Isa::ALL.into_iter().filter_map(|isa| Exec::on(isa).ok()).collect();
        let theirs: Vec<_> = sets
            .iter()
            .map(|exec| moe_merge_model::Model::open_with(&source, *exec).unwrap())
            .collect();
        let (rows, length) = (ids.shape[0], ids.shape[1]);
        for row in 0..rows {
            let tokens = &ids.ids()[row * length..(row + 1) * length];
            let expected = logits.row(row);
            for (exec, theirs) in sets.iter().zip(&theirs) {
                let set = exec.isa.name();
                let same = golden::relative_difference(&common::logits(theirs, tokens), expected);
                println!("{case} row {row} {set}: {same:.2e} with mergekit's gates");
                assert!(same <= LOGITS_F32, "{case} row {row} {set}: {same}");
            }
            let own = median_difference(&common::logits(&ours, tokens), expected, length);
            println!("{case} row {row}: {own:.2e} (median) with our gates");
            assert!(own <= GATE_ROUNDING, "{case} row {row}: {own}");
        }
    }
}

#[test]
fn qwen_gates_are_exact_in_f32() {
    let Some(dir) = shared("golden/moe") else { return };
    let expected = golden::load(&repository("tests/data/gates_f32.safetensors"));
    let temp = tempfile::tempdir().unwrap();
    for case in QWEN {
        let output = common::build(&dir.join(format!("{case}.yaml")), &temp.path().join(case));
        let source = common::open(&output);
        for layer in 0..3 {
            let found = source.weight(&format!("model.layers.{layer}.mlp.gate.weight")).unwrap();
            let difference = golden::relative_difference(
                &found.to_f32().unwrap(),
                &expected[&format!("{case}.gate_{layer}")].values,
            );
            assert!(difference <= LOGITS_F32, "{case} layer {layer}: {difference}");
        }
    }
}

/// Recipes whose reference gates are further from f32 than [`GATE_COSINE`].
const QWEN: &[&str] = &["qwen2_moe_hidden", "qwen3_moe_hidden"];

/// Cosine that the bf16 arithmetic of mergekit leaves on the random Qwen models; transformers in f32 has the same.
const QWEN_BF16: f64 = 0.9997;

/// Median over tokens of the largest difference: a token at the edge between two experts may go the other way.
fn median_difference(found: &[f32], expected: &[f64], tokens: usize) -> f64 {
    let width = found.len() / tokens;
    let scale = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
    let mut each: Vec<f64> = found
        .chunks(width)
        .zip(expected.chunks(width))
        .map(|(f, e)| {
            f.iter().zip(e).fold(0f64, |m, (f, e)| m.max((f64::from(*f) - e).abs())) / scale
        })
        .collect();
    each.sort_by(f64::total_cmp);
    each[tokens / 2]
}

/// How far the logits of most tokens may move because mergekit computes gates in bf16 and we in f32.
const GATE_ROUNDING: f64 = 5e-3;

//! `extract-lora`: base plus adapter comes as near to the tuned model as the rank allows, in our reader and in PEFT.

#[allow(dead_code)]
mod cli;
mod common;

use std::path::{Path, PathBuf};

use cli::run;
use common::{made_up, open};
use moe_merge_checkpoint::{Source, SourceRef};
use moe_merge_testkit::{python, repository, shared};
use serde_json::{Value, json};

/// `base+adapter`, opened.
fn with_adapter(base: &Path, adapter: &Path) -> Source {
    let reference = SourceRef {
        model: base.display().to_string(),
        revision: None,
        lora: Some(adapter.display().to_string()),
        lora_revision: None,
    };
    Source::open(&reference, Path::new("")).unwrap()
}

fn extract(base: &Path, tuned: &Path, out: &Path, options: &[&str]) -> Value {
    let paths = [base, tuned, out].map(|p| p.display().to_string());
    let mut args = vec!["extract-lora", &paths[0], &paths[1], "--out", &paths[2], "--json"];
    args.extend(options);
    let run = run(&args);
    assert_eq!(run.code, 0, "{}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap()
}

/// Squared distances of the tensors of `found` from those of `expected`, and of these from `base`; over all tensors but
/// norms, which are stored whole and have to be equal.
fn distances(found: &Source, expected: &Source, base: &Source) -> (f64, f64) {
    let (mut left, mut all) = (0.0, 0.0);
    assert_eq!(
        found.tensors.keys().collect::<Vec<_>>(),
        expected.tensors.keys().collect::<Vec<_>>()
    );
    for (name, weight) in &expected.tensors {
        let values = weight.to_f32().unwrap();
        let square = |other: &Source| -> f64 {
            let other = other.tensors[name].to_f32().unwrap();
            values.iter().zip(other).map(|(a, b)| f64::from(a - b).powi(2)).sum()
        };
        if weight.shape().len() == 1 {
            assert!(square(found) < 1e-12, "{name}");
            continue;
        }
        left += square(found);
        all += square(base);
    }
    (left, all)
}

/// Two models of one family with made-up weights, which differ in everything.
fn two(temp: &Path, config: Value) -> (PathBuf, PathBuf) {
    let (base, tuned) = (temp.join("base"), temp.join("tuned"));
    let source = made_up(&base, &config);
    std::fs::create_dir_all(&tuned).unwrap();
    std::fs::copy(base.join("config.json"), tuned.join("config.json")).unwrap();
    // Other numbers: those of the base, shifted by one place and made smaller.
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .tensors
        .iter()
        .map(|(name, w)| {
            let mut values = w.to_f32().unwrap();
            let shifted = values.clone();
            let count = values.len();
            for (i, v) in values.iter_mut().enumerate() {
                *v += 0.125 * shifted[(i * 7 + 3) % count];
            }
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name.clone(), w.shape().to_vec(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name, view.unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(tuned.join("model.safetensors"), file).unwrap();
    (base, tuned)
}

#[test]
fn full_rank_gives_the_tuned_model() {
    let temp = tempfile::tempdir().unwrap();
    let cases = [
        ("llama", json!({"attention_bias": true})),
        ("tied", json!({"tie_word_embeddings": true})),
        (
            "mixtral",
            json!({"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}),
        ),
        (
            "qwen2_moe",
            json!({"model_type": "qwen2_moe", "num_experts": 3, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}),
        ),
    ];
    for (name, config) in cases {
        let dir = temp.path().join(name);
        let moe = config.get("num_experts_per_tok").is_some();
        let (base, tuned) = two(&dir, config);
        let mut ways = vec![vec![], vec!["--embed-lora", "--no-distribute-scale"]];
        if moe {
            ways.push(vec!["--packing", "fused"]);
        }
        for (i, way) in ways.into_iter().enumerate() {
            let out = dir.join(format!("adapter-{i}"));
            let options: Vec<&str> = ["--rank", "96"].into_iter().chain(way).collect();
            let report = extract(&base, &tuned, &out, &options);
            assert!(report["energy_kept"].as_f64().unwrap() > 1.0 - 1e-5, "{name} {options:?}");
            assert_eq!(report["unchanged"], 0);
            let (left, all) = distances(&with_adapter(&base, &out), &open(&tuned), &open(&base));
            assert!(left.sqrt() < 1e-5 * all.sqrt(), "{name} {options:?}: {left} of {all}");
        }
    }
}

#[test]
fn what_is_missing_at_a_lower_rank_is_what_the_report_says() {
    let temp = tempfile::tempdir().unwrap();
    let (base, tuned) = two(temp.path(), json!({}));
    let mut before = 1.0;
    for rank in ["1", "4", "16"] {
        let out = temp.path().join(rank);
        let report = extract(&base, &tuned, &out, &["--rank", rank, "--embed-lora"]);
        let (left, all) = distances(&with_adapter(&base, &out), &open(&tuned), &open(&base));
        let kept = report["energy_kept"].as_f64().unwrap();
        assert!((left / all - (1.0 - kept)).abs() < 2e-3, "{rank}: {left} of {all}, {kept}");
        assert!(1.0 - kept < before, "{kept}");
        before = 1.0 - kept;
    }
    // Half of the energy of each change, at the smallest rank that has it.
    let out = temp.path().join("half");
    let report = extract(&base, &tuned, &out, &["--rank", "64", "--energy", "0.5"]);
    let modules = report["modules"].as_array().unwrap();
    let kept = |m: &Value| m["energy_kept"].as_f64().unwrap();
    assert!(modules.iter().all(|m| (0.5..0.7).contains(&kept(m))), "{modules:?}");
    let (left, all) = distances(&with_adapter(&base, &out), &open(&tuned), &open(&base));
    assert!(left < 0.5 * all, "{left} of {all}");
}

#[test]
fn the_experts_of_the_quickstart() {
    let temp = tempfile::tempdir().unwrap();
    let moe = common::build(&repository("recipes/quickstart.yaml"), &temp.path().join("moe"));
    let base = repository("recipes/quickstart/base");
    // The expert of the MoE as an adapter on the dense base: base + adapter has the expert's MLPs.
    let out = temp.path().join("dense");
    let report = extract(&base, &moe, &out, &["--expert", "1", "--rank", "400"]);
    let (adapted, moe_source, dense) = (with_adapter(&base, &out), open(&moe), open(&base));
    let modules = report["modules"].as_array().unwrap();
    assert!(!modules.is_empty() && modules.len().is_multiple_of(3));
    for layer in 0..modules.len() / 3 {
        for (short, long) in [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")] {
            let name = format!("model.layers.{layer}.mlp.{long}.weight");
            let expert = format!("model.layers.{layer}.block_sparse_moe.experts.1.{short}.weight");
            let found = adapted.tensors[&name].to_f32().unwrap();
            let expected = moe_source.tensors[&expert].to_f32().unwrap();
            let base = dense.tensors[&name].to_f32().unwrap();
            let scale = base.iter().zip(&expected).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            let worst = found.iter().zip(&expected).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(scale > 0.0 && worst < 1e-4 * scale, "{name}: {worst} of {scale}");
        }
    }
    // One expert of a MoE, both ways of packing: nothing else changes.
    for packing in ["modules", "fused"] {
        let out = temp.path().join(packing);
        let tuned = repository("recipes/quickstart").join("base");
        extract(&moe, &tuned, &out, &["--expert", "0", "--rank", "400", "--packing", packing]);
        let found = with_adapter(&moe, &out);
        for (name, weight) in &moe_source.tensors {
            let own = name.contains(".experts.0.");
            let same = weight.to_f32().unwrap() == found.tensors[name].to_f32().unwrap();
            assert_eq!(same, !own, "{packing} {name}");
        }
    }
}

#[test]
fn mistakes_are_told_and_leave_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (base, tuned) = two(temp.path(), json!({}));
    let (base, tuned) = (base.display().to_string(), tuned.display().to_string());
    let out = temp.path().join("out");
    let out_text = out.display().to_string();
    let call = |base: &str, tuned: &str, more: &[&str]| {
        let mut args = vec!["extract-lora", base, tuned, "--out", &out_text];
        args.extend(more);
        run(&args)
    };
    call(&base, &base, &[])
        .fails(2, &["there is nothing to put into an adapter", "the same in both"]);
    call(&base, &tuned, &["--expert", "0"]).fails(2, &["neither model has experts"]);
    call(&base, &tuned, &["--include", "nowhere"]).fails(2, &["no module is left", "nowhere"]);
    call(&base, &tuned, &["--include", "("]).fails(2, &["no regular expression"]);
    call(&base, &tuned, &["--energy", "1.5"]).fails(2, &["`--energy` is out of range"]);
    call(&base, &tuned, &["--threshold", "-1"]).fails(2, &["error"]);
    call(&base, &tuned, &["--threshold=-1"]).fails(2, &["`--threshold` is out of range"]);
    call(&base, &tuned, &["--packing", "fused", "--expert", "0"]).fails(2, &["neither model"]);
    let other = temp.path().join("other");
    made_up(&other, &json!({"vocab_size": 80}));
    call(&base, &other.display().to_string(), &[])
        .fails(2, &["lm_head.weight", "different shapes", "--exclude"]);
    let without = temp.path().join("without").display().to_string();
    let other = other.display().to_string();
    let kept = run(&[
        "extract-lora",
        &base,
        &other,
        "--out",
        &without,
        "--exclude",
        "(embed_tokens|lm_head)$",
    ]);
    assert_eq!(kept.code, 0, "{}", kept.stderr);
    let moe = temp.path().join("moe");
    made_up(
        &moe,
        &json!({"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}),
    );
    let moe = moe.display().to_string();
    call(&base, &moe, &[]).fails(2, &["different families"]);
    call(&base, &moe, &["--expert", "3"]).fails(2, &["no such expert", "0 to 2"]);
    let damaged = temp.path().join("damaged");
    std::fs::create_dir(&damaged).unwrap();
    for name in ["config.json", "model.safetensors"] {
        let mut bytes = std::fs::read(Path::new(&tuned).join(name)).unwrap();
        if name == "model.safetensors" {
            let end = bytes.len();
            bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        std::fs::write(damaged.join(name), bytes).unwrap();
    }
    call(&base, &damaged.display().to_string(), &[]).fails(3, &["not finite", "damaged"]);
    run(&["extract-lora", &base, &tuned, "--out", &tuned, "--force"])
        .fails(3, &["replace one of its own sources"]);
    assert!(!out.exists());
    // An adapter that is there already stays unless it may be replaced; other folders stay in any case.
    assert_eq!(call(&base, &tuned, &["--rank", "2"]).code, 0);
    call(&base, &tuned, &[]).fails(2, &["exists already"]);
    let again = call(&base, &tuned, &["--rank", "3", "--force"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    let config = std::fs::read_to_string(out.join("adapter_config.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&config).unwrap()["r"], 3);
    std::fs::remove_file(out.join("adapter_config.json")).unwrap();
    call(&base, &tuned, &["--force"]).fails(2, &["no model folder"]);
}

#[test]
fn peft_loads_what_is_written() {
    let Some(python) = python("MOE_MERGE_PYTHON") else { return };
    let Some(golden) = shared("golden/arch") else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut cases = Vec::new();
    for (family, packing) in [
        ("llama_tied", "modules"),
        ("llama_tied", "embed"),
        ("qwen2", "modules"),
        ("mixtral", "modules"),
        ("mixtral", "fused"),
        ("qwen3_moe", "fused"),
    ] {
        let base = golden.join(family).canonicalize().unwrap();
        let tuned = temp.path().join(format!("{family}-{packing}-tuned"));
        let moved = moved(&base, &tuned, family == "llama_tied");
        let out = temp.path().join(format!("{family}-{packing}"));
        // Transformers 5 stacks the experts' own pairs, but not those of norms and routers beside them.
        let options: &[&str] = match (family, packing) {
            ("mixtral", "modules") => &["--rank", "64", "--include", "experts"],
            (_, "embed") => &["--rank", "64", "--embed-lora"],
            (_, packing) => &["--rank", "64", "--packing", packing],
        };
        extract(&base, &tuned, &out, options);
        let source = with_adapter(&base, &out);
        let model = moe_merge_model::Model::open(&source).unwrap();
        let tokens = [1u32, 5, 9, 2, 7, 3];
        cases.push(json!({
            "base": base, "adapter": out, "tokens": tokens, "moved": moved,
            "logits": common::logits(&model, &tokens),
        }));
    }
    let input = temp.path().join("cases.json");
    std::fs::write(&input, Value::from(cases).to_string()).unwrap();
    let script = repository("tests/python/check_peft.py");
    let output = std::process::Command::new(python).arg(script).arg(&input).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    print!("{text}");
}

/// The model in `base` with other numbers, in `tuned`; returns how many tensors moved.
fn moved(base: &Path, tuned: &Path, embeddings: bool) -> usize {
    let source = open(base);
    std::fs::create_dir_all(tuned).unwrap();
    std::fs::copy(base.join("config.json"), tuned.join("config.json")).unwrap();
    let mut number = 0;
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .tensors
        .iter()
        .map(|(name, w)| {
            let mut values = w.to_f32().unwrap();
            let old = values.clone();
            let vocabulary = name.contains("embed_tokens") || name.contains("lm_head");
            if !vocabulary || embeddings {
                number += 1;
                let count = old.len();
                values
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, v)| *v += 0.2 * old[(i * 5 + 2) % count]);
            }
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name.clone(), w.shape().to_vec(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let dtype = safetensors::Dtype::F32;
        (name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
    });
    std::fs::write(tuned.join("model.safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
    number
}

//! `upcycle` and `shrink`: what copies and their mergers have to be, exactly.

#[allow(dead_code)]
mod cli;
mod common;

use std::path::{Path, PathBuf};

use cli::run;
use common::{logits, made_up, open};
use moe_merge_checkpoint::Source;
use moe_merge_model::Model;
use moe_merge_testkit::{python, repository};
use serde_json::{Value, json};

fn call(args: &[&str], out: &Path) -> Value {
    let out = out.display().to_string();
    let run = run(&[args, &["--out", &out, "--json"]].concat());
    assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn of(source: &Source, name: &str) -> Vec<f32> {
    source.weight(name).unwrap().to_f32().unwrap()
}

#[test]
fn copies_without_noise_are_the_dense_model() {
    let temp = tempfile::tempdir().unwrap();
    let tokens = [3u32, 14, 15, 92, 65, 35];
    for (family, config, top_k) in [
        ("mixtral", json!({}), "2"),
        ("mixtral", json!({"tie_word_embeddings": true}), "1"),
        ("qwen3_moe", json!({"model_type": "qwen3", "head_dim": 16}), "3"),
    ] {
        let base = temp.path().join(format!("{family}-{top_k}-base"));
        let dense = made_up(&base, &config);
        let out = temp.path().join(format!("{family}-{top_k}"));
        let path = text(&base);
        let report = call(&["upcycle", &path, "--experts", "4", "--top-k", top_k], &out);
        assert_eq!((&report["family"], &report["experts"]), (&json!(family), &json!(4)));
        let expected = logits(&Model::open(&dense).unwrap(), &tokens);
        let found = logits(&Model::open(&open(&out)).unwrap(), &tokens);
        let scale = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        let worst = found.iter().zip(&expected).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst < 1e-5 * scale, "{family}: {worst} of {scale}");
        let verify = run(&["verify", &text(&out)]);
        assert_eq!(verify.code, 0, "{}{}", verify.stdout, verify.stderr);
    }
}

#[test]
fn noise_and_neurons_drawn_anew() {
    let temp = tempfile::tempdir().unwrap();
    let base = temp.path().join("base");
    let dense = made_up(&base, &json!({}));
    let path = text(&base);
    let args = |more: &[&'static str]| -> Vec<String> {
        let fixed = ["upcycle", &path, "--experts", "3", "--keep-first"];
        fixed.iter().chain(more).map(|s| (*s).to_owned()).collect()
    };
    let build = |name: &str, more: &[&'static str]| -> PathBuf {
        let out = temp.path().join(name);
        let args = args(more);
        call(&args.iter().map(String::as_str).collect::<Vec<_>>(), &out);
        out
    };
    let one = build("one", &["--reinit", "0.25", "--noise", "0.1"]);
    let again = build("again", &["--reinit", "0.25", "--noise", "0.1", "--threads", "1"]);
    let other = build("other", &["--reinit", "0.25", "--noise", "0.1", "--seed", "1"]);
    let index = |dir: &Path| std::fs::read(dir.join("model.safetensors.index.json")).unwrap();
    // Names of shards hold hashes of their contents.
    assert_eq!(index(&one), index(&again));
    assert_ne!(index(&one), index(&other));
    let drawn = open(&build("drawn", &["--reinit", "0.25"]));
    for layer in 0..3 {
        let mlp = |name: &str| of(&dense, &format!("model.layers.{layer}.mlp.{name}.weight"));
        let expert = |e: usize, name: &str| {
            of(&drawn, &format!("model.layers.{layer}.block_sparse_moe.experts.{e}.{name}.weight"))
        };
        assert_eq!(expert(0, "w1"), mlp("gate_proj"));
        let mut chosen = Vec::new();
        for e in [1, 2] {
            // A quarter of 96 neurons: the same rows of gate and up, the same columns of down.
            let rows = |new: &[f32], old: &[f32]| -> Vec<usize> {
                let lines = new.chunks(64).zip(old.chunks(64)).enumerate();
                lines.filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect()
            };
            let (new, old) = (expert(e, "w2"), mlp("down_proj"));
            let columns: Vec<usize> =
                (0..96).filter(|c| (0..64).any(|r| new[r * 96 + c] != old[r * 96 + c])).collect();
            let gate = rows(&expert(e, "w1"), &mlp("gate_proj"));
            assert_eq!(gate.len(), 24);
            assert_eq!((&gate, &gate), (&rows(&expert(e, "w3"), &mlp("up_proj")), &columns));
            chosen.push(gate);
        }
        assert_ne!(chosen[0], chosen[1]);
    }
}

/// A MoE of six experts, three of them copies of the others: `(0 2) (1 4) (3 5)`.
fn doubled(temp: &Path) -> (PathBuf, Source) {
    let config = json!({"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 4});
    let folder = temp.join("doubled");
    let source = made_up(&folder, &config);
    let like = [0, 1, 0, 3, 1, 3];
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .tensors
        .iter()
        .map(|(name, weight)| {
            let mut values = weight.to_f32().unwrap();
            if let Some((head, tail)) = name.split_once(".experts.") {
                let (e, matrix) = tail.split_once('.').unwrap();
                let e: usize = e.parse().unwrap();
                values = of(&source, &format!("{head}.experts.{}.{matrix}", like[e]));
            }
            if name.ends_with("gate.weight") {
                let width = weight.shape()[1];
                let old = values.clone();
                for (e, from) in like.iter().enumerate() {
                    let row = &old[from * width..(from + 1) * width];
                    values[e * width..(e + 1) * width].copy_from_slice(row);
                }
            }
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name.clone(), weight.shape().to_vec(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let dtype = safetensors::Dtype::F32;
        (name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
    let source = open(&folder);
    (folder, source)
}

#[test]
fn copies_of_experts_become_one_again() {
    let temp = tempfile::tempdir().unwrap();
    let (folder, source) = doubled(temp.path());
    let out = temp.path().join("out");
    let report = call(&["shrink", &text(&folder), "--experts", "3"], &out);
    assert_eq!((&report["experts"], &report["experts_per_token"]), (&json!([6, 3]), &json!(3)));
    let found = open(&out);
    for (layer, line) in report["layers"].as_array().unwrap().iter().enumerate() {
        assert_eq!(line["groups"], json!([[0, 2], [1, 4], [3, 5]]));
        assert!(line["loss"].as_f64().unwrap() < 1e-6);
        let stem = format!("model.layers.{layer}.block_sparse_moe");
        let (new, old) = (
            of(&found, &format!("{stem}.gate.weight")),
            of(&source, &format!("{stem}.gate.weight")),
        );
        for (to, from) in [0, 1, 3].into_iter().enumerate() {
            for w in ["w1", "w2", "w3"] {
                let name = |e: usize| format!("{stem}.experts.{e}.{w}.weight");
                assert_eq!(of(&found, &name(to)), of(&source, &name(from)), "{}", name(to));
            }
            assert_eq!(new[to * 64..(to + 1) * 64], old[from * 64..(from + 1) * 64]);
        }
    }
    // Experts of four pairs visited alike, or of two: the same numbers from the model.
    let mut whole = Model::open(&source).unwrap();
    let mut shrunk = Model::open(&found).unwrap();
    whole.set_experts_per_token(6).unwrap();
    shrunk.set_experts_per_token(3).unwrap();
    let tokens = [5u32, 9, 30, 2];
    let (a, b) = (logits(&whole, &tokens), logits(&shrunk, &tokens));
    let scale = a.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(worst < 1e-5 * scale, "{worst} of {scale}");
    // The same names for the experts in reports: those they are made of.
    let inspect = run(&["inspect", &text(&out)]);
    assert!(inspect.stdout.contains("0+2"), "{}", inspect.stdout);
    assert_eq!(run(&["verify", &text(&out)]).code, 0);
}

#[test]
fn use_decides_what_is_kept() {
    let temp = tempfile::tempdir().unwrap();
    let recipe = repository("recipes/quickstart.yaml");
    let moe = common::build(&recipe, &temp.path().join("moe"));
    let file = temp.path().join("text.txt");
    std::fs::write(&file, "fn main() { let x = 12; }\nfn add(a: usize) -> usize { a }\n".repeat(8))
        .unwrap();
    let (plain, used) = (temp.path().join("plain"), temp.path().join("used"));
    let path = text(&moe);
    let by_weights = call(&["shrink", &path, "--experts", "2"], &plain);
    let by_use = call(&["shrink", &path, "--experts", "2", "--text", &text(&file)], &used);
    for (a, b) in
        by_weights["layers"].as_array().unwrap().iter().zip(by_use["layers"].as_array().unwrap())
    {
        let shares = |l: &Value| -> Vec<f64> {
            l["used"].as_array().unwrap().iter().map(|u| u.as_f64().unwrap()).collect()
        };
        let (even, own) = (shares(a), shares(b));
        assert!(even.windows(2).all(|w| w[0] == w[1]));
        assert!((own.iter().sum::<f64>() - 1.0).abs() < 1e-9 && own != even);
        let loss = |l: &Value| l["loss"].as_f64().unwrap();
        assert!(loss(b) > 0.0 && loss(b) < 1.0 && loss(a) < 1.0);
    }
    assert_eq!(run(&["verify", &text(&used)]).code, 0);
    let generated = run(&["generate", &text(&used), "--prompt", "fn", "--max-new-tokens", "4"]);
    assert_eq!(generated.code, 0, "{}", generated.stderr);
    // Routers fitted anew are a generation of their own; nothing else changes.
    let fitted = temp.path().join("fitted");
    let calibrated = call(
        &["shrink", &path, "--experts", "2", "--text", &text(&file), "--calibrate=60"],
        &fitted,
    );
    assert_eq!(calibrated["layers"], by_use["layers"]);
    assert_eq!(
        (&calibrated["calibrated"]["generation"], &calibrated["calibrated"]["parent"]),
        (&json!(1), &json!(0))
    );
    let (before, after) = (open(&used), open(&fitted));
    for name in before.tensors.keys() {
        let router = name.ends_with("gate.weight");
        assert_eq!(of(&before, name) == of(&after, name), !router, "{name}");
    }
}

#[test]
fn mistakes_are_told_and_leave_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (folder, _) = doubled(temp.path());
    let dense = temp.path().join("dense");
    made_up(&dense, &json!({}));
    let grouped = temp.path().join("grouped");
    made_up(
        &grouped,
        &json!({
            "model_type": "deepseek_v2", "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 16,
            "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
        }),
    );
    let (moe, dense, grouped) = (text(&folder), text(&dense), text(&grouped));
    let out = temp.path().join("out");
    let place = text(&out);
    let call = |args: &[&str]| run(&[args, &["--out", place.as_str()]].concat());
    call(&["shrink", &moe, "--experts", "6"]).fails(2, &["cannot be shrunk", "1 to 5"]);
    call(&["shrink", &moe, "--experts", "1", "--calibrate"]).fails(2, &["nothing to choose"]);
    call(&["shrink", &moe, "--experts", "2", "--calibrate=0"]).fails(2, &["--calibrate"]);
    call(&["shrink", &moe, "--experts", "0"]).fails(2, &["cannot be shrunk"]);
    call(&["shrink", &dense, "--experts", "2"]).fails(2, &["has no experts"]);
    call(&["shrink", &grouped, "--experts", "2"]).fails(2, &["groups", "n_group"]);
    call(&["upcycle", &dense, "--experts", "1"]).fails(2, &["`--experts` is out of range"]);
    call(&["upcycle", &dense, "--experts", "2", "--top-k", "3"]).fails(2, &["`--top-k`", "1 to 2"]);
    call(&["upcycle", &dense, "--experts", "2", "--reinit", "1.5"]).fails(2, &["`--reinit`"]);
    call(&["upcycle", &dense, "--experts", "2", "--noise=-1"]).fails(2, &["`--noise`"]);
    call(&["upcycle", &moe, "--experts", "2"]).fails(2, &["MoE already"]);
    call(&["upcycle", &dense, "--experts", "2", "--architecture", "qwen3"])
        .fails(2, &["unknown output family"]);
    assert!(!out.exists());
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine"), "").unwrap();
    call(&["upcycle", &dense, "--experts", "2"]).fails(2, &["exists already"]);
    call(&["shrink", &moe, "--experts", "2", "--force"]).fails(2, &["no model folder"]);
}

#[test]
fn transformers_loads_both() {
    let Some(python) = python("MOE_MERGE_PYTHON") else { return };
    let temp = tempfile::tempdir().unwrap();
    let base = repository("recipes/quickstart/base");
    let (up, down) = (temp.path().join("up"), temp.path().join("down"));
    call(&["upcycle", &text(&base), "--experts", "4", "--noise", "0.2"], &up);
    call(&["shrink", &text(&up), "--experts", "2"], &down);
    let tokens = "1,5,9,2,7";
    let mut cases = Vec::new();
    for (name, folder) in [("upcycled", &up), ("shrunk", &down)] {
        let file = temp.path().join(format!("{name}.safetensors"));
        let logits = run(&["logits", &text(folder), "--tokens", tokens, "--out", &text(&file)]);
        assert_eq!(logits.code, 0, "{}", logits.stderr);
        cases.push(json!({
            "name": name, "folder": folder, "logits": file, "tokens": [1, 5, 9, 2, 7],
            "bound": moe_merge_testkit::golden::LOGITS_BF16, "class": "MixtralForCausalLM",
            "config": {}, "source": base,
        }));
    }
    let input = temp.path().join("cases.json");
    std::fs::write(&input, Value::from(cases).to_string()).unwrap();
    let script = repository("tests/python/check_load.py");
    let output = std::process::Command::new(python).arg(script).arg(&input).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stderr));
}

//! Folders of every layout after their routers were replaced: `verify` is content, transformers 4 and 5 load the new
//! values.

#[allow(dead_code)]
mod cli;
mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::layouts::{ALL, Files, lay_out};
use moe_merge_checkpoint::generation::{Change, NewTensors, commit};
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Dtype, Interrupt, WeightRef};
use moe_merge_merge::families::Layout;
use moe_merge_model::Model;
use moe_merge_testkit::golden::LOGITS_F32;
use moe_merge_testkit::{python, repository};
use serde_json::{Value, json};

const TOKENS: [u32; 12] = [1, 17, 40, 99, 3, 250, 12, 77, 8, 140, 61, 5];

/// Builds a Mixtral of the quickstart's models and lays its tensors out anew, as another program would have.
fn build(temp: &Path, how: Files) -> PathBuf {
    let sources = repository("recipes/quickstart");
    let source = |name: &str| format!("\"{}/{name}\"", sources.display());
    let text = format!(
        "base_model: {}\ngate_mode: random\ndtype: float32\nexperts_per_token: 1\nexperts:\n\
         - {{source_model: {}, positive_prompts: [a]}}\n- {{source_model: {}, positive_prompts: [b]}}\n",
        source("base"),
        source("prose"),
        source("code")
    );
    let built = common::build_text(&text, &temp.join("x.yaml"), &temp.join(how.name), how.layout);
    lay_out(built, how)
}

/// Replaces every router by numbers made from `seed`.
fn replace(folder: &Path, seed: usize) {
    let source = common::open(folder);
    let routers = source.tensors.iter().filter(|(name, _)| name.ends_with("moe.gate.weight"));
    let tensors: Vec<(String, WeightRef)> = routers
        .map(|(name, old)| {
            let values: Vec<f32> =
                (0..old.len()).map(|i| ((i * seed) as f32 * 0.37).sin() * 0.2).collect();
            let new = OwnedWeight::from_f32(name, &values, old.shape(), Dtype::F32);
            (name.clone(), Arc::new(new) as WeightRef)
        })
        .collect();
    assert!(!tensors.is_empty());
    let change = Change {
        action: "calibrate",
        message: Some("for a test"),
        tensors: vec![NewTensors { role: "router".into(), tensors }],
        ..Change::default()
    };
    commit(folder, &change, Watch { interrupt: &Interrupt::default(), progress: &|_| {} }).unwrap();
}

fn logits(folder: &Path) -> Vec<f32> {
    common::logits(&Model::open(&common::open(folder)).unwrap(), &TOKENS)
}

/// What transformers has to find.
fn case(temp: &Path, name: &str, folder: &Path) -> Value {
    let file = temp.join(format!("{name}.safetensors"));
    let tokens = TOKENS.map(|t| t.to_string()).join(",");
    let run = cli::run(&[
        "logits",
        &folder.display().to_string(),
        "--quiet",
        "--tokens",
        &tokens,
        "--out",
        &file.display().to_string(),
    ]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    json!({"name": name, "folder": folder, "logits": file, "tokens": TOKENS, "bound": LOGITS_F32,
        "class": "MixtralForCausalLM", "config": {}})
}

#[track_caller]
fn verified(folder: &Path, generation: u32) -> Value {
    let found = cli::run(&["verify", "--json", &folder.display().to_string()]).json();
    assert_eq!(found["problems"], json!([]));
    assert_eq!((&found["ok"], &found["generation"]), (&json!(true), &json!(generation)));
    found
}

fn check(cases: &[Value], temp: &Path, python: PathBuf) {
    let list = temp.join("cases.json");
    std::fs::write(&list, serde_json::to_vec(cases).unwrap()).unwrap();
    let script = repository("tests/python/check_load.py");
    let output = Command::new(&python).arg(script).arg(&list).output();
    let output = output.unwrap_or_else(|e| panic!("{}: {e}", python.display()));
    let (text, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    print!("{text}");
    assert!(output.status.success(), "{}: {errors}", python.display());
    assert_eq!(text.lines().count(), cases.len(), "{errors}");
}

#[test]
fn every_layout_is_verified_and_loaded_after_changes() {
    let temp = tempfile::tempdir().unwrap();
    let temp = temp.path();
    let mut cases = Vec::new();
    for how in ALL {
        let folder = build(temp, *how);
        let before = logits(&folder);
        replace(&folder, 3);
        let first = logits(&folder);
        verified(&folder, 1);
        replace(&folder, 5);
        let second = logits(&folder);
        verified(&folder, 2);
        assert!(before != first && first != second, "{}: nothing changed", how.name);
        cases.push(case(temp, how.name, &folder));
    }
    // The bytes of a folder say what it is, whoever wrote its shards: all have the same routers now.
    let all: Vec<Vec<f32>> = ALL.iter().map(|how| logits(&temp.join(how.name))).collect();
    assert!(all.windows(2).all(|w| w[0] == w[1]));
    if let Some(python) = python("MOE_MERGE_PYTHON") {
        check(&cases, temp, python);
    }
    if let Some(python) = python("MOE_MERGE_PYTHON_4") {
        // It does not know the fused layout.
        let hub = |how: &Files| how.layout == Layout::Hub;
        let hub: Vec<Value> =
            ALL.iter().zip(&cases).filter(|(h, _)| hub(h)).map(|(_, c)| c.clone()).collect();
        check(&hub, temp, python);
    }
}

#[test]
fn verify_finds_what_was_changed_by_hand() {
    let temp = tempfile::tempdir().unwrap();
    let folder = build(temp.path(), ALL[0]);
    replace(&folder, 3);
    let path = folder.display().to_string();
    let shown = cli::run(&["inspect", &path]);
    assert!(shown.stdout.contains("generation 1"), "{}", shown.stdout);
    assert!(shown.stdout.contains("1 calibrate, 20"), "{}", shown.stdout);
    let flip = |file: &Path| {
        let mut bytes = std::fs::read(file).unwrap();
        let at = bytes.len() - 2;
        bytes[at] ^= 1;
        std::fs::write(file, bytes).unwrap();
    };
    let problem = |says: &str| {
        let found = cli::run(&["verify", &path]);
        assert_eq!(found.code, 1, "{}", found.stderr);
        assert!(found.stdout.contains(says), "{}", found.stdout);
    };
    let files = common::open(&folder).files;
    let router = files.iter().find(|f| f.display().to_string().contains("router")).unwrap();
    flip(router);
    problem(&router.file_name().unwrap().to_string_lossy());
    flip(router);
    verified(&folder, 1);
    let journal = folder.join(".moe-merge/journal.jsonl");
    let text = std::fs::read_to_string(&journal).unwrap();
    std::fs::write(&journal, text.replacen("build", "guild", 1)).unwrap();
    problem("the journal is broken at line 2");
    std::fs::write(&journal, text).unwrap();
    std::fs::remove_dir_all(folder.join(".moe-merge/store")).unwrap();
    let notes = verified(&folder, 1)["notes"].clone();
    assert!(notes[0].as_str().unwrap().contains("older generations cannot come back"), "{notes}");
}

//! transformers loads the folder after every kind of change, and computes what we compute.

mod change;
#[allow(dead_code)]
mod cli;
mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use change::{dense, moe, text};
use common::layouts::{ALL, lay_out};
use moe_merge_merge::families::Layout;
use moe_merge_testkit::golden::LOGITS_F32;
use moe_merge_testkit::{python, repository};
use serde_json::{Value, json};

const TOKENS: [u32; 12] = [1, 17, 40, 99, 3, 250, 12, 77, 8, 140, 61, 5];

/// A copy of the folder as it is now, without history, and our logits of it.
fn case(temp: &Path, name: &str, folder: &Path) -> Value {
    let copy = temp.join(format!("loaded {name}"));
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(folder).unwrap().flatten().filter(|e| e.path().is_file()) {
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let file = temp.join(format!("{name}.safetensors"));
    let tokens = TOKENS.map(|t| t.to_string()).join(",");
    let run =
        cli::run(&["logits", &text(folder), "--quiet", "--tokens", &tokens, "--out", &text(&file)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    json!({"name": name, "folder": copy, "logits": file, "tokens": TOKENS, "bound": LOGITS_F32,
        "class": "MixtralForCausalLM", "config": {}})
}

/// Runs a list of changes on a folder, each with a look at it.
fn story(temp: &Path, name: &str, folder: &Path) -> Vec<Value> {
    let (path, math) = (text(folder), text(&dense("math")));
    let prompts = json!({"prose": ["the mill seemed gentle when the bells rang"],
        "code": ["pub fn split_depth(depth: i32) -> i32 { depth }"],
        "math": ["17 * 9 = 153, so 153 / 17 = 9."]});
    let prompts = cli::file(temp, &format!("{name}.json"), prompts.to_string().as_bytes());
    let two = cli::file(
        temp,
        &format!("{name} two.json"),
        json!({"0": ["17 * 9 = 153, so"], "1": ["pub fn main() { let x = 1; }"]})
            .to_string()
            .as_bytes(),
    );
    let steps: [(&str, Vec<&str>); 7] = [
        ("swap", vec!["swap", &path, "--expert", "0", "--with", &math, "--convert"]),
        ("rollback", vec!["rollback", &path]),
        ("add", vec!["add", &path, "--with", &math, "--convert"]),
        ("drop", vec!["drop", &path, "--expert", "1"]),
        ("back to add", vec!["rollback", &path]),
        ("back to the first", vec!["rollback", &path, "--to", "0"]),
        (
            "calibrate",
            vec!["calibrate", &path, "--prompts", if name == "roles" { &prompts } else { &two }],
        ),
    ];
    let mut cases = Vec::new();
    for (step, args) in steps {
        if step == "calibrate" && name == "roles" {
            let run = cli::run(&[
                "add",
                &path,
                "--with",
                &math,
                "--convert",
                "--calibrate",
                "--prompts",
                &prompts,
            ]);
            assert_eq!(run.code, 0, "{}", run.stderr);
            cases.push(case(temp, &format!("{name}, add with a row"), folder));
        }
        let run = cli::run(&args);
        assert_eq!(run.code, 0, "{name} {step}: {}", run.stderr);
        cases.push(case(temp, &format!("{name}, {step}"), folder));
    }
    cases
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
fn transformers_loads_the_folder_after_every_change() {
    let found = [python("MOE_MERGE_PYTHON"), python("MOE_MERGE_PYTHON_4")];
    if found.iter().all(Option::is_none) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let temp = temp.path();
    let mut cases = Vec::new();
    for how in ALL
        .iter()
        .filter(|how| ["roles", "numbered", "single", "numbered fused"].contains(&how.name))
    {
        let built = moe(temp, how.name, how.layout, "dtype: float32\n");
        let folder = lay_out(built, *how);
        let fused = how.layout == Layout::Fused;
        // A fused layer stays fused in a swap and becomes experts where their number changes: 4.x reads the latter.
        cases.extend(story(temp, how.name, &folder).into_iter().map(|case| (fused, case)));
    }
    let [five, four] = found;
    if let Some(python) = five {
        let all: Vec<Value> = cases.iter().map(|(_, case)| case.clone()).collect();
        check(&all, temp, python);
    }
    if let Some(python) = four {
        let hub = cases.iter().filter(|(fused, _)| !fused).map(|(_, case)| case.clone());
        check(&hub.collect::<Vec<_>>(), temp, python);
    }
}

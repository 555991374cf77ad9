//! `calibrate`: new routers for folders of several kinds, and what it refuses.

#[allow(dead_code)]
mod cli;
mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moe_merge_checkpoint::Source;
use moe_merge_merge::calibrate::alone;
use moe_merge_merge::families::Layout;
use moe_merge_model::{Model, Spec};
use moe_merge_testkit::{repository, shared};
use serde_json::{Value, json};

const PROSE: [&str; 3] = [
    "the mill seemed gentle when the bells rang, and Mara wandered home",
    "that winter the station was quiet; nobody remembered the letter",
    "the old inn near the river looked stubborn in the morning light",
];
const CODE: [&str; 3] = [
    "pub fn split_depth(depth: i32) -> i32 { let mut start = depth; start }",
    "fn main() { let values = vec![1, 2, 3]; for v in values { print(v); } }",
    "impl Parser { fn next(&mut self) -> Option<usize> { self.at += 1; None } }",
];

/// A MoE of the quickstart's models with routers that were drawn.
fn moe(temp: &Path, architecture: &str, layout: Layout) -> PathBuf {
    let sources = repository("recipes/quickstart");
    let source = |name: &str| format!("\"{}/{name}\"", sources.display());
    let mut text = format!(
        "base_model: {}\ngate_mode: random\nexperts_per_token: 1\narchitecture: {architecture}\nexperts:\n\
         - {{source_model: {}, positive_prompts: [a]}}\n- {{source_model: {}, positive_prompts: [b]}}\n",
        source("base"),
        source("prose"),
        source("code")
    );
    if architecture == "qwen2_moe" {
        text += &format!(
            "shared_experts:\n- {{source_model: {}, positive_prompts: [c]}}\n",
            source("base")
        );
    }
    common::build_text(&text, &temp.join("x.yaml"), &temp.join("moe"), layout)
}

fn prompts(temp: &Path) -> String {
    let text = json!({"prose": PROSE, "code": CODE}).to_string();
    cli::file(temp, "prompts.json", text.as_bytes())
}

fn tensors(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let source = common::open(folder);
    let bytes = |w: &moe_merge_checkpoint::WeightRef| w.bytes().unwrap().to_vec();
    source.tensors.iter().map(|(n, w)| (n.clone(), bytes(w))).collect()
}

/// Calibrates and checks that the routers changed, and nothing else.
fn calibrated(folder: &Path, args: &[&str]) -> Value {
    let before = tensors(folder);
    let path = folder.display().to_string();
    let all: Vec<&str> =
        ["calibrate", &path, "--json"].into_iter().chain(args.iter().copied()).collect();
    let found = cli::run(&all);
    assert_eq!(found.code, 0, "{}", found.stderr);
    let report: Value = serde_json::from_str(&found.stdout).unwrap();
    let after = tensors(folder);
    assert_eq!(before.len(), after.len());
    for (name, bytes) in &before {
        let router = name.ends_with("mlp.gate.weight") || name.ends_with("moe.gate.weight");
        assert_eq!(after[name] != *bytes, router, "{name}");
    }
    let verified = cli::run(&["verify", "--json", &path]).json();
    assert_eq!(
        (&verified["problems"], &verified["generation"]),
        (&json!([]), &report["generation"])
    );
    report
}

#[test]
fn routers_of_every_family_learn_from_prompts() {
    for (architecture, layout) in [
        ("mixtral", Layout::Hub),
        ("mixtral", Layout::Fused),
        ("qwen2_moe", Layout::Hub),
        ("ernie4_5_moe", Layout::Hub),
        ("granitemoeshared", Layout::Hub),
    ] {
        let temp = tempfile::tempdir().unwrap();
        let folder = moe(temp.path(), architecture, layout);
        let prompts = prompts(temp.path());
        if architecture == "granitemoeshared" {
            // Its router has another name.
            let path = folder.display().to_string();
            let run = cli::run(&["calibrate", &path, "--prompts", &prompts]);
            assert_eq!(run.code, 0, "{}", run.stderr);
            continue;
        }
        let report = calibrated(&folder, &["--prompts", &prompts, "--message", "six prompts"]);
        assert_eq!((&report["generation"], &report["parent"]), (&json!(1), &json!(0)));
        assert_eq!(report["experts"], json!(["prose", "code"]));
        let accuracy = |e: usize| report["forecast"]["experts"][e]["accuracy"].as_f64().unwrap();
        assert!(accuracy(0) > 0.7 && accuracy(1) > 0.7, "{architecture} {report}");
        let shown = cli::run(&["inspect", &folder.display().to_string()]).stdout;
        assert!(shown.contains("1 calibrate, 20") && shown.contains(": six prompts"), "{shown}");
        assert!(shown.contains("gates: auto"), "{shown}");
    }
}

#[test]
fn a_foreign_folder_with_experts_by_number() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "mixtral", Layout::Hub);
    std::fs::remove_dir_all(folder.join(".moe-merge")).unwrap();
    let lines: String = PROSE
        .iter()
        .map(|t| (0, t))
        .chain(CODE.iter().map(|t| (1, t)))
        .map(|(expert, text)| format!("{}\n", json!({"expert": expert.to_string(), "text": text})))
        .collect();
    let file = cli::file(temp.path(), "prompts.jsonl", lines.as_bytes());
    let report = calibrated(&folder, &["--prompts", &file, "--estimator", "logistic"]);
    assert_eq!(report["experts"], json!(["0", "1"]));
    for estimator in ["hidden", "hidden_avg", "cheap_embed", "random"] {
        calibrated(&folder, &["--prompts", &file, "--estimator", estimator, "--seed", "3"]);
    }
    let lines = moe_merge_checkpoint::generation::history(&folder).unwrap();
    let actions: Vec<&str> = lines.iter().map(|l| l.action.as_str()).collect();
    assert_eq!(
        actions,
        ["import", "calibrate", "calibrate", "calibrate", "calibrate", "calibrate"]
    );
    assert_eq!(lines[1].details["estimator"], "logistic");
    assert_eq!(lines[1].details["tokens"].as_array().unwrap().len(), 2);
}

#[test]
fn experts_write_their_own_text() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "mixtral", Layout::Hub);
    let report = calibrated(&folder, &["--self-text", "600", "--seed", "1"]);
    let own = report["self_text_tokens"].as_u64().unwrap();
    assert!(own > 200, "{report}");
    let shards = |folder: &Path| {
        let files = common::open(folder).files;
        files.iter().map(|f| f.file_name().unwrap().to_owned()).collect::<Vec<_>>()
    };
    // The same seed gives the same routers, whatever they were before.
    let temp = tempfile::tempdir().unwrap();
    let again = moe(temp.path(), "mixtral", Layout::Hub);
    let mut args = vec!["calibrate".to_owned(), again.display().to_string()];
    args.extend(["--self-text", "600", "--seed", "1", "--threads", "1"].map(String::from));
    assert_eq!(cli::run(&args).code, 0);
    assert_eq!(shards(&folder), shards(&again));
}

/// An expert alone is the base with that expert's MLPs.
#[test]
fn one_expert_alone_is_a_dense_model() {
    for (architecture, layout) in
        [("mixtral", Layout::Hub), ("mixtral", Layout::Fused), ("qwen3_moe", Layout::Hub)]
    {
        let temp = tempfile::tempdir().unwrap();
        let quickstart = repository("recipes/quickstart");
        let (folder, base, expert) = match architecture {
            "qwen3_moe" => {
                let Some(golden) = shared("golden/moe/qwen3") else { continue };
                let source = |name: &str| golden.join(name).display().to_string();
                let text = format!(
                    "base_model: \"{}\"\ngate_mode: random\narchitecture: qwen3_moe\nexperts:\n\
                     - {{source_model: \"{}\", positive_prompts: [a]}}\n- {{source_model: \"{}\", positive_prompts: [b]}}\n",
                    source("base"),
                    source("prose"),
                    source("code"),
                );
                let out = temp.path().join("moe");
                let folder = common::build_text(&text, &temp.path().join("x.yaml"), &out, layout);
                (folder, golden.join("base"), golden.join("code"))
            }
            _ => (
                moe(temp.path(), architecture, layout),
                quickstart.join("base"),
                quickstart.join("code"),
            ),
        };
        let source = common::open(&folder);
        let only = alone(&source, &Spec::of(&source).unwrap(), 1).unwrap();
        let (mut dense, expert): (Source, Source) = (common::open(&base), common::open(&expert));
        for (name, weight) in &mut dense.tensors {
            if name.contains(".mlp.") {
                *weight = expert.tensors[name].clone();
            }
        }
        let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 200).collect();
        let logits = |s: &Source| common::logits(&Model::open(s).unwrap(), &tokens);
        let (a, b) = (logits(&only), logits(&dense));
        let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let difference = a.iter().zip(&b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
        assert!(difference <= 2e-5 * largest, "{architecture}: {difference} of {largest}");
    }
}

#[test]
fn a_copy_leaves_the_model_as_it_is() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "mixtral", Layout::Hub);
    let before = tensors(&folder);
    let (path, out) = (folder.display().to_string(), temp.path().join("copy"));
    let out_text = out.display().to_string();
    let prompts = prompts(temp.path());
    let args = ["calibrate", &path, "--prompts", &prompts, "--out", &out_text];
    let plan = cli::run(&[&args[..], &["--dry-run"]].concat());
    assert!(plan.code == 0 && plan.stdout.contains("nothing was written"), "{}", plan.stderr);
    assert!(!out.exists());
    let run = cli::run(&args);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stdout.contains("generation 1"), "{}", run.stdout);
    assert!(run.stdout.contains("own tokens first"), "{}", run.stdout);
    assert_eq!(tensors(&folder), before);
    assert_ne!(tensors(&out), before);
    let verified = cli::run(&["verify", "--json", &out_text]).json();
    assert_eq!((&verified["problems"], &verified["generation"]), (&json!([]), &json!(1)));
    cli::run(&args).fails(2, &["output exists already", &out_text]);
    let names: Vec<_> =
        std::fs::read_dir(temp.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(!names.iter().any(|n| n.to_string_lossy().starts_with('.')), "{names:?}");
}

#[test]
fn what_is_refused_changes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "mixtral", Layout::Hub);
    let (path, prompts) = (folder.display().to_string(), prompts(temp.path()));
    let before = tensors(&folder);
    let dense = repository("recipes/quickstart/base").display().to_string();
    let refused = |args: &[&str], code: i32, says: &[&str]| {
        cli::run(&[&["calibrate"], args].concat()).fails(code, says);
        assert_eq!(tensors(&folder), before);
    };
    refused(
        &[&dense, "--prompts", &prompts],
        2,
        &["the model is dense: it has no experts", "`llama`", "hint: "],
    );
    let args = [&path, "--prompts", &prompts, "--estimator", "hiden"];
    refused(&args, 2, &["unknown estimator `hiden`", "did you mean `hidden`?"]);
    refused(&[&path], 2, &["no text to calibrate with", "`auto`", "--self-text N"]);
    let wrong = cli::file(
        temp.path(),
        "wrong.json",
        json!({"prose": ["a"], "coed": ["b"]}).to_string().as_bytes(),
    );
    refused(&[&path, "--prompts", &wrong], 2, &["no expert is called `coed`", "`code`"]);
    let half =
        cli::file(temp.path(), "half.json", json!({"prose": ["a b c"]}).to_string().as_bytes());
    refused(&[&path, "--prompts", &half], 2, &["expert `code` has no prompts"]);
    refused(&[&path, "--prompts", "nowhere.json"], 3, &["nowhere.json"]);
    let adapter = format!("{path}+nowhere");
    refused(&[&adapter, "--prompts", &prompts], 3, &["source not found"]);
    let journal = folder.join(".moe-merge/journal.jsonl");
    std::fs::write(&journal, "{}\n").unwrap();
    refused(&[&path, "--prompts", &prompts], 3, &["the journal is broken at line 1"]);
}

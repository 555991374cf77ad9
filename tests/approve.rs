//! Changes that have to be approved: staged, evaluated, made live or refused.

mod change;
#[allow(dead_code)]
mod cli;
mod common;

use std::path::Path;

use change::{dense, files, model_files, moe, pairs, tensors, text, verified, with};
use moe_merge_merge::families::Layout;
use moe_merge_testkit::repository;
use serde_json::{Value, json};

fn run(args: &[&str]) -> Value {
    cli::run(&[args, &["--json", "--quiet"]].concat()).json()
}

/// A folder whose settings ask for approval, with evaluation text.
fn guarded(temp: &Path, thresholds: Value) -> std::path::PathBuf {
    let folder = moe(temp, "moe", Layout::Hub, "");
    let domains = ["prose", "code"].map(|name| {
        let from = repository("recipes/quickstart").join(format!("eval_{name}.txt"));
        let text = std::fs::read_to_string(from).unwrap();
        let short: String = text.chars().take(1200).collect();
        let to = format!(".moe-merge/{name}.txt");
        std::fs::write(folder.join(&to), short).unwrap();
        (name.to_owned(), json!(to))
    });
    let evaluation: serde_json::Map<String, Value> = domains.into_iter().collect();
    let settings =
        json!({"approval": "required", "evaluation": evaluation, "thresholds": thresholds});
    std::fs::write(folder.join(".moe-merge/settings.json"), settings.to_string()).unwrap();
    folder
}

#[test]
fn a_change_waits_until_it_is_approved() {
    let temp = tempfile::tempdir().unwrap();
    let folder = guarded(temp.path(), json!({"perplexity_rise": 10.0}));
    let (path, math) = (text(&folder), text(&dense("math")));
    let (before, on_disk) = (tensors(&folder), files(&folder));
    let swap = ["swap", &path, "--expert", "0", "--with", &math];
    cli::run(&swap).fails(1, &["have to be approved", "--stage"]);
    let prompts = json!({"prose": ["a b c d"], "code": ["e f g h"]}).to_string();
    let prompts = cli::file(temp.path(), "prompts.json", prompts.as_bytes());
    cli::run(&["calibrate", &path, "--prompts", &prompts]).fails(1, &["have to be approved"]);
    assert_eq!(files(&folder), on_disk);
    cli::run(&["approve", &path]).fails(2, &["no such change waits"]);

    let staged = run(&[&swap[..], &["--stage", "--message", "sums"]].concat());
    assert_eq!((&staged["generation"], &staged["staged"]), (&Value::Null, &json!(1)));
    assert_eq!(staged["refused"], json!([]));
    assert_eq!(tensors(&folder), before);
    verified(&folder, 0);
    let history = run(&["history", &path]);
    assert_eq!(history["staged"][0]["generation"], json!(1));
    let domains: Vec<&str> = staged["effect"]["domains"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| d["domain"].as_str().unwrap())
        .collect();
    assert_eq!(domains, ["code", "prose"]);

    let live = run(&["approve", &path, "1"]);
    assert_eq!((&live["generation"], &live["live"]), (&json!(1), &json!(true)));
    assert_eq!(tensors(&folder), with(&before, &tensors(&dense("math")), &pairs(0, 0..6)));
    verified(&folder, 1);
    let history = run(&["history", &path]);
    assert_eq!(history["generations"][1]["message"], "sums");
    assert_eq!(history["generations"][1]["details"]["effect"], staged["effect"]);
    assert_eq!(history["staged"], json!([]));
    // Going back needs no approval.
    run(&["rollback", &path]);
    assert_eq!(tensors(&folder), before);
}

#[test]
fn a_change_that_does_harm_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let folder = guarded(temp.path(), json!({"perplexity_rise": 0.001, "routing_moved": 0.9}));
    let (path, math) = (text(&folder), text(&dense("math")));
    let before = tensors(&folder);
    let swap = ["swap", &path, "--expert", "prose", "--with", &math, "--stage"];
    let shown = cli::run(&swap);
    assert_eq!(shown.code, 0, "{}", shown.stderr);
    assert!(shown.stdout.contains("waits to become generation 1"), "{}", shown.stdout);
    assert!(shown.stdout.contains("would be refused: perplexity rises"), "{}", shown.stdout);
    cli::run(&["approve", &path]).fails(1, &["breaks the limits", "at most 0.10 %", "--reject"]);
    assert_eq!(tensors(&folder), before);
    assert_eq!(run(&["approve", &path, "--reject"])["rejected"], json!(1));
    cli::run(&["approve", &path, "1"]).fails(2, &["no such change waits"]);
    // An expert in place of itself does no harm.
    let prose = text(&dense("prose"));
    run(&["swap", &path, "--expert", "prose", "--with", &prose, "--stage"]);
    assert_eq!(run(&["approve", &path])["live"], json!(true));
    verified(&folder, 1);
}

#[test]
fn what_waits_is_held_against_what_was_staged() {
    let temp = tempfile::tempdir().unwrap();
    let folder = guarded(temp.path(), json!({}));
    let (path, math) = (text(&folder), text(&dense("math")));
    let stage = |expert: &str| {
        run(&["swap", &path, "--expert", expert, "--with", &math, "--stage"]);
    };
    stage("0");
    // Somebody touches it.
    let staged = folder.join(".moe-merge/proposals/1");
    let shard = std::fs::read_dir(&staged).unwrap().flatten().map(|e| e.path());
    let shard = shard.into_iter().find(|p| p.extension().is_some_and(|e| e == "safetensors"));
    let shard = shard.unwrap();
    let bytes = std::fs::read(&shard).unwrap();
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, &changed).unwrap();
    cli::run(&["approve", &path]).fails(3, &["a staged file is not as it was written"]);
    std::fs::write(&shard, &bytes).unwrap();
    // The model changes meanwhile.
    run(&["approve", &path]);
    stage("1");
    run(&["rollback", &path]);
    cli::run(&["approve", &path]).fails(3, &["changed in the meantime"]);
    verified(&folder, 2);
}

/// Adding and dropping wait in the same way.
#[test]
fn another_number_of_experts_waits_too() {
    let temp = tempfile::tempdir().unwrap();
    let folder = guarded(temp.path(), json!({}));
    let (path, math) = (text(&folder), text(&dense("math")));
    let on_disk = model_files(&folder);
    run(&["add", &path, "--with", &math, "--stage"]);
    assert_eq!(model_files(&folder), on_disk);
    run(&["approve", &path]);
    verified(&folder, 1);
    let staged = run(&["drop", &path, "--expert", "math", "--stage"]);
    let moved = staged["effect"]["domains"][0]["moved"].as_f64().unwrap();
    assert!(moved < 0.7, "only tokens that visited it move: {staged}");
    run(&["approve", &path]);
    verified(&folder, 2);
    let now = tensors(&folder);
    run(&["rollback", &path, "--to", "0"]);
    assert_eq!(tensors(&folder), now);
}

#[test]
fn new_routers_wait_too() {
    let temp = tempfile::tempdir().unwrap();
    let folder = guarded(temp.path(), json!({"routing_moved": 1.0}));
    let path = text(&folder);
    let before = tensors(&folder);
    let prompts = json!({"prose": ["the mill seemed gentle when the bells rang"],
        "code": ["pub fn split_depth(depth: i32) -> i32 { depth }"]});
    let prompts = cli::file(temp.path(), "prompts.json", prompts.to_string().as_bytes());
    let staged = run(&["calibrate", &path, "--prompts", &prompts, "--stage"]);
    assert_eq!((&staged["generation"], &staged["live"]), (&json!(1), &json!(false)));
    assert!(staged["effect"]["domains"][0]["moved"].as_f64().unwrap() > 0.0, "{staged}");
    assert_eq!(tensors(&folder), before);
    run(&["approve", &path]);
    let now = tensors(&folder);
    assert!(
        now.iter().all(|(name, bytes)| (before[name] != *bytes) == name.contains("gate.weight"))
    );
    let shown = cli::run(&["inspect", &path]).stdout;
    assert!(shown.contains("gates: auto"), "{shown}");
    verified(&folder, 1);
}

//! How well an expert learns a domain that no model has seen, beside a full training, and what that does to the others.

#[allow(dead_code)]
mod cli;
mod common;
mod kitchen;

use std::path::{Path, PathBuf};

use moe_merge_merge::families::Layout;
use moe_merge_testkit::shared;
use serde_json::Value;

/// A MoE of the four tiny experts.
fn tiny(models: &Path, temp: &Path) -> PathBuf {
    let prompts = std::fs::read_to_string(models.join("prompts.json")).unwrap();
    let prompts: Value = serde_json::from_str(&prompts).unwrap();
    let mut text =
        format!("base_model: \"{}/base\"\nexperts_per_token: 2\nexperts:\n", models.display());
    for (name, own) in prompts.as_object().unwrap() {
        text += &format!(
            "- {{source_model: \"{}/{name}\", name: {name}, positive_prompts: {own}}}\n",
            models.display()
        );
    }
    common::build_text(&text, &temp.join("tiny.yaml"), &temp.join("moe"), Layout::Hub)
}

#[test]
fn a_new_domain_is_learnt_nearly_as_by_a_full_training_and_others_stay() {
    let Some(models) = shared("models/tiny") else { return };
    let temp = tempfile::tempdir().unwrap();
    let moe = tiny(&models, temp.path());
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 60_000).as_bytes());
    let held = cli::file(temp.path(), "held.txt", kitchen::text(2, 8_000).as_bytes());
    let mut evaluation = vec![format!("kitchen={held}")];
    for name in ["prose", "math", "facts"] {
        evaluation.push(format!("{name}={}/eval_{name}.txt", models.display()));
    }
    let path = moe.display().to_string();
    let run = |extra: &[&str]| -> Value {
        let mut args = vec!["finetune", &path, "--expert", "code", "--data", &data, "--json"];
        args.extend([
            "--window",
            "128",
            "--batch-tokens",
            "1024",
            "--steps",
            "60",
            "--hold-out",
            "0",
        ]);
        args.extend(["--eval-tokens", "2048", "--eval"]);
        args.extend(evaluation.iter().map(String::as_str));
        args.extend(extra);
        let run = cli::run(&args);
        assert_eq!(run.code, 0, "{}", run.stderr);
        serde_json::from_str(&run.stdout).unwrap()
    };
    let adapter = temp.path().join("adapter").display().to_string();
    let low = run(&["--out", &adapter, "--learning-rate", "0.01"]);
    // Everything of the MLPs is trained, and nothing holds the others.
    let full = run(&["--full", "--apply", "--learning-rate", "0.003", "--keep", "0"]);
    let nats = |report: &Value, domain: usize, key: &str| {
        report["domains"][domain][key].as_f64().unwrap().ln()
    };
    let before = nats(&low, 0, "before");
    let closed = (before - nats(&low, 0, "after")) / (before - nats(&full, 0, "after"));
    println!("share of the gap that rank 8 closes: {closed:.3}");
    assert!(closed >= 0.8, "{closed}: {low} {full}");
    for domain in 1..4 {
        let moved = (nats(&low, domain, "after") - nats(&low, domain, "before")).exp() - 1.0;
        println!("{} moves by {:.2} %", low["domains"][domain]["name"], 100.0 * moved);
        assert!(moved.abs() < 0.01, "{low}");
    }
}

#[test]
fn a_router_that_learns_leaves_other_domains_where_they_were() {
    let Some(models) = shared("models/tiny") else { return };
    let temp = tempfile::tempdir().unwrap();
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 60_000).as_bytes());
    let held = cli::file(temp.path(), "held.txt", kitchen::text(2, 8_000).as_bytes());
    let mut evaluation = vec![format!("kitchen={held}")];
    for name in ["prose", "math", "facts"] {
        evaluation.push(format!("{name}={}/eval_{name}.txt", models.display()));
    }
    // Points that the share of visits gains: of the own domain, of the others in the mean.
    let gains = |name: &str, penalty: &str| {
        let folder = temp.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let path = tiny(&models, &folder).display().to_string();
        let mut args = vec!["finetune", &path, "--expert", "code", "--data", &data, "--json"];
        args.extend(["--window", "128", "--batch-tokens", "1024", "--steps", "40", "--apply"]);
        args.extend(["--hold-out", "0", "--learning-rate", "0.01", "--keep", "0"]);
        args.extend(["--train-router", "--router-penalty", penalty, "--eval-tokens", "2048"]);
        args.push("--eval");
        args.extend(evaluation.iter().map(String::as_str));
        let run = cli::run(&args);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(run.stderr.is_empty() || run.stderr.contains("--keep 30"), "{}", run.stderr);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        let gain = |domain: usize| {
            let visits = &report["domains"][domain]["visits"];
            visits[1].as_f64().unwrap() - visits[0].as_f64().unwrap()
        };
        assert!(report["warnings"].to_string().contains("`--keep 30` holds them"), "{report}");
        let others = (gain(1) + gain(2) + gain(3)) / 3.0;
        println!("penalty {penalty}: own {:+.3}, others {others:+.3}", gain(0));
        (gain(0), others)
    };
    let ((own, others), (free, drawn)) = (gains("held", "100"), gains("free", "0"));
    assert!(others < 0.5 * drawn, "{others} {drawn}");
    assert!(own > 0.8 * free && own > 0.1, "{own} {free}");
}

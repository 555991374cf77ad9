//! What the tests of `finetune` share. Each of them uses its part.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moe_merge_checkpoint::WeightRef;
use moe_merge_merge::families::Layout;
use moe_merge_testkit::repository;
use serde_json::Value;

use crate::{cli, common};

/// A MoE of two of the quickstart's models.
pub fn quickstart(temp: &Path, architecture: &str, layout: Layout) -> PathBuf {
    let sources = repository("recipes/quickstart");
    let source = |name: &str| format!("\"{}/{name}\"", sources.display());
    let text = format!(
        "base_model: {}\nexperts_per_token: 1\narchitecture: {architecture}\nexperts:\n\
         - {{source_model: {}, name: prose, positive_prompts: [\"the mill seemed gentle when the bells rang\"]}}\n\
         - {{source_model: {}, name: code, positive_prompts: [\"pub fn split_depth(depth: i32) -> i32\"]}}\n",
        source("base"),
        source("prose"),
        source("code")
    );
    common::build_text(&text, &temp.join("x.yaml"), &temp.join("moe"), layout)
}

/// Bytes of every tensor, under canonical names.
pub fn tensors(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let source = common::open(folder);
    let bytes = |w: &WeightRef| w.bytes().unwrap().to_vec();
    source.tensors.iter().map(|(n, w)| (n.clone(), bytes(w))).collect()
}

/// `finetune FOLDER --json ARGS`, with nothing that holds other domains if `ARGS` does not say otherwise.
pub fn finetune(folder: &Path, args: &[&str]) -> cli::Run {
    let path = folder.display().to_string();
    let free = if args.contains(&"--keep") { &[][..] } else { &["--keep", "0"] };
    cli::run(&[&["finetune", &path, "--json"], args, free].concat())
}

/// What a run reported.
pub fn report(run: &cli::Run) -> Value {
    assert_eq!(run.code, 0, "{}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap()
}

/// A training of three steps.
pub const SHORT: [&str; 8] =
    ["--steps", "3", "--window", "64", "--batch-tokens", "256", "--learning-rate", "0.005"];

/// The quickstart's MoE in f32, in which adapters are not rounded away.
pub fn wide(temp: &Path, architecture: &str) -> PathBuf {
    let sources = repository("recipes/quickstart");
    let source = |name: &str| format!("\"{}/{name}\"", sources.display());
    let mut text = format!(
        "base_model: {}\nexperts_per_token: 2\ngate_mode: random\ndtype: float32\narchitecture: {architecture}\n\
         experts:\n- {{source_model: {}, positive_prompts: [a]}}\n- {{source_model: {}, positive_prompts: [b]}}\n\
         - {{source_model: {}, positive_prompts: [c]}}\n",
        source("base"),
        source("prose"),
        source("code"),
        source("math")
    );
    if architecture == "qwen2_moe" {
        text += &format!(
            "shared_experts:\n- {{source_model: {}, positive_prompts: [d]}}\n",
            source("base")
        );
    }
    common::build_text(&text, &temp.join("x.yaml"), &temp.join("moe"), Layout::Hub)
}

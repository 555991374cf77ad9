//! What the tests of changes share: a small MoE, its tensors, its files.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moe_merge_checkpoint::Source;
use moe_merge_checkpoint::manifest::hash_bytes;
use moe_merge_merge::families::Layout;
use moe_merge_testkit::repository;
use serde_json::{Value, json};

use super::{cli, common};

/// The index of a model folder.
pub const INDEX: &str = "model.safetensors.index.json";

/// A model of the quickstart.
pub fn dense(name: &str) -> PathBuf {
    repository("recipes/quickstart").join(name)
}

/// A MoE of `prose` and `code` in `temp/name`, its routers drawn.
pub fn moe(temp: &Path, name: &str, layout: Layout, more: &str) -> PathBuf {
    let source = |name: &str| format!("\"{}\"", dense(name).display());
    let text = format!(
        "base_model: {}\ngate_mode: random\nexperts_per_token: 1\n{more}experts:\n\
         - {{source_model: {}, positive_prompts: [a]}}\n- {{source_model: {}, positive_prompts: [b]}}\n",
        source("base"),
        source("prose"),
        source("code")
    );
    common::build_text(&text, &temp.join("x.yaml"), &temp.join(name), layout)
}

pub type Tensors = BTreeMap<String, Vec<u8>>;

pub fn tensors_of(source: &Source) -> Tensors {
    source.tensors.iter().map(|(n, w)| (n.clone(), w.bytes().unwrap().to_vec())).collect()
}

pub fn tensors(folder: &Path) -> Tensors {
    tensors_of(&common::open(folder))
}

/// Every file below a folder with its hash.
pub fn files(folder: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                all.insert(name, hash_bytes(&std::fs::read(&path).unwrap()));
            }
        }
    }
    all
}

/// The same without history.
pub fn model_files(folder: &Path) -> BTreeMap<String, String> {
    files(folder).into_iter().filter(|(name, _)| !name.starts_with(".moe-merge")).collect()
}

pub fn text(path: &Path) -> String {
    path.display().to_string()
}

pub fn swapped(folder: &Path, expert: &str, with: &str, more: &[&str]) -> Value {
    let folder = text(folder);
    let args = ["swap", &folder, "--expert", expert, "--with", with, "--json", "--quiet"];
    cli::run(&[&args[..], more].concat()).json()
}

#[track_caller]
pub fn verified(folder: &Path, generation: u32) {
    let found = cli::run(&["verify", "--json", &text(folder)]).json();
    assert_eq!((&found["problems"], &found["generation"]), (&json!([]), &json!(generation)));
    assert_eq!((&found["notes"], &found["extra_tensors"]), (&json!([]), &json!([])));
}

/// Names of a Mixtral expert's tensors beside those of a dense MLP.
pub fn pairs(expert: usize, layers: impl Iterator<Item = usize>) -> Vec<(String, String)> {
    let all = layers.flat_map(|l| {
        [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")].map(|(ours, theirs)| {
            let moe = format!("model.layers.{l}.block_sparse_moe.experts.{expert}.{ours}.weight");
            (moe, format!("model.layers.{l}.mlp.{theirs}.weight"))
        })
    });
    all.collect()
}

/// The tensors `before`, with some taken from another model.
pub fn with(before: &Tensors, other: &Tensors, pairs: &[(String, String)]) -> Tensors {
    let mut all = before.clone();
    for (ours, theirs) in pairs {
        *all.get_mut(ours).unwrap() = other[theirs].clone();
    }
    all
}

//! `swap`, `history`, `rollback`: what changes, what stays, how it comes back, what is refused.

mod change;
#[allow(dead_code)]
mod cli;
mod common;

use std::path::{Path, PathBuf};

use change::{
    INDEX, dense, files, model_files, moe, pairs, swapped, tensors, text, verified, with,
};
use common::layouts::{ALL, lay_out};
use moe_merge_merge::families::Layout;
use serde_json::{Value, json};

#[test]
fn a_dense_model_takes_an_experts_place_and_gives_it_back() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let (before, on_disk) = (tensors(&folder), files(&folder));
    let math = text(&dense("math"));

    let plan = swapped(&folder, "prose", &math, &["--dry-run"]);
    assert_eq!((&plan["generation"], &plan["bytes_written"]), (&Value::Null, &json!(0)));
    assert_eq!(files(&folder), on_disk, "a dry run writes nothing");

    let report = swapped(&folder, "prose", &math, &["--name", "math", "--message", "sums"]);
    assert_eq!((&report["generation"], &report["parent"]), (&json!(1), &json!(0)));
    assert_eq!((&report["expert"], &report["name"]), (&json!(0), &json!("math")));
    let expected = with(&before, &tensors(&dense("math")), &pairs(0, 0..6));
    assert_eq!(tensors(&folder), expected, "the expert's tensors, and nothing else");
    verified(&folder, 1);

    // One new shard and the index, nothing else of the model is touched.
    let now = files(&folder);
    let own = |name: &&String| !name.starts_with(".moe-merge");
    let new: Vec<&String> =
        now.keys().filter(own).filter(|name| on_disk.get(*name) != now.get(*name)).collect();
    assert_eq!(new.len(), 2, "{new:?}");
    assert!(new[0].starts_with("model-expert-00-") && new[1] == INDEX, "{new:?}");
    let sizes: u64 = new.iter().map(|n| folder.join(n).metadata().unwrap().len()).sum();
    assert_eq!(report["bytes_written"], json!(sizes));
    let bytes: usize = pairs(0, 0..6).iter().map(|(ours, _)| expected[ours].len()).sum();
    assert_eq!(report["expert_bytes"], json!(bytes));
    // Header of a shard with 18 tensors, index of the whole model.
    let index = folder.join(INDEX).metadata().unwrap().len();
    assert!(sizes - index - (bytes as u64) < 3000, "{sizes} {index} {bytes}");

    let history = cli::run(&["history", &text(&folder)]).stdout;
    assert!(
        history.contains("*   1  swap math with math") && history.contains(": sums"),
        "{history}"
    );
    let shown = cli::run(&["inspect", &text(&folder)]).stdout;
    assert!(shown.contains("experts: math, code") && shown.contains("expert 0: math"), "{shown}");

    let back = cli::run(&["rollback", &text(&folder), "--message", "no", "--json"]).json();
    assert_eq!((&back["generation"], &back["to"]), (&json!(2), &json!(0)));
    assert_eq!(tensors(&folder), before);
    let mut original = on_disk;
    original.retain(|name, _| !name.starts_with(".moe-merge"));
    assert_eq!(model_files(&folder), original, "index and shards byte for byte");
    verified(&folder, 2);

    // Forwards again, and back by number.
    let again = cli::run(&["rollback", &text(&folder), "--to", "1", "--json"]).json();
    assert_eq!((&again["generation"], &again["to"]), (&json!(3), &json!(1)));
    assert_eq!(tensors(&folder), expected);
    verified(&folder, 3);
    let document = cli::run(&["history", &text(&folder), "--json"]).json();
    assert_eq!(document["live"], json!(3));
    let actions: Vec<&str> = document["generations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| g["action"].as_str().unwrap())
        .collect();
    assert_eq!(actions, ["build", "swap", "rollback", "rollback"]);
    assert_eq!(document["generations"][1]["details"]["with"], "math");

    // What is forgotten cannot come back, and says so.
    let pruned = cli::run(&["history", &text(&folder), "--prune", "--json"]).json();
    assert_eq!(pruned["pruned"]["generations"], json!([0, 2]));
    assert!(pruned["pruned"]["bytes"].as_u64().unwrap() >= bytes as u64);
    cli::run(&["rollback", &text(&folder), "--to", "0"])
        .fails(3, &["of generation 0 is gone", "history --prune"]);
    assert_eq!(tensors(&folder), expected);
}

#[test]
fn some_layers_only() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let before = tensors(&folder);
    let report = swapped(&folder, "1", &text(&dense("math")), &["--layers", "2..4"]);
    assert_eq!(report["layers"], json!([2, 3]));
    assert_eq!(tensors(&folder), with(&before, &tensors(&dense("math")), &pairs(1, 2..4)));
    verified(&folder, 1);
    // The rest of the expert moved along: it is one file still.
    let own = model_files(&folder).into_keys().filter(|n| n.starts_with("model-expert-01"));
    assert_eq!(own.count(), 1);
}

#[test]
fn folders_of_others_and_fused_ones() {
    for how in ALL {
        let temp = tempfile::tempdir().unwrap();
        let folder = lay_out(moe(temp.path(), how.name, how.layout, ""), *how);
        let (before, on_disk) = (tensors(&folder), model_files(&folder));
        let expected = with(&before, &tensors(&dense("math")), &pairs(1, 0..6));
        let report = swapped(&folder, "1", &text(&dense("math")), &[]);
        assert_eq!(tensors(&folder), expected, "{}", how.name);
        let found = cli::run(&["verify", "--json", &text(&folder)]).json();
        assert_eq!(found["problems"], json!([]), "{}", how.name);
        // No file of the model was written to: each is where it was, or under another name.
        let now = files(&folder);
        for (name, hash) in on_disk.iter().filter(|(name, _)| name.as_str() != INDEX) {
            assert!(now.get(name) == Some(hash) || now.values().any(|h| h == hash), "{name}");
        }
        // A second change, of the other expert, then all the way back.
        swapped(&folder, "0", &text(&dense("math")), &[]);
        let both = with(&expected, &tensors(&dense("math")), &pairs(0, 0..6));
        assert_eq!(tensors(&folder), both, "{}", how.name);
        verified(&folder, 2);
        let back = cli::run(&["rollback", &text(&folder), "--json"]).json();
        assert_eq!(back["to"], json!(1));
        assert_eq!(tensors(&folder), expected, "{}", how.name);
        verified(&folder, 3);
        let back = cli::run(&["rollback", &text(&folder), "--json"]).json();
        assert_eq!(back["to"], json!(0), "taking back once more goes on from there");
        assert_eq!(tensors(&folder), before, "{}", how.name);
        assert_eq!(model_files(&folder), on_disk, "{}", how.name);
        verified(&folder, 4);
        let again = cli::run(&["rollback", &text(&folder), "--to", "2", "--json"]).json();
        assert_eq!(again["generation"], json!(5));
        assert_eq!(tensors(&folder), both, "{}", how.name);
        verified(&folder, 5);
        let fused = how.layout == Layout::Fused;
        assert_eq!(
            report["bytes_written"].as_u64() > report["expert_bytes"].as_u64().map(|b| 2 * b),
            fused
        );
    }
}

#[test]
fn every_form_of_a_source() {
    let temp = tempfile::tempdir().unwrap();
    let temp = temp.path();
    let folder = moe(temp, "moe", Layout::Hub, "");
    let before = tensors(&folder);
    let base = tensors(&dense("base"));

    // An expert of another MoE, by name and by number, in either layout.
    let other = moe(temp, "other", Layout::Fused, "");
    let expected = with(&before, &tensors(&dense("code")), &pairs(0, 0..6));
    for expert in ["code", "1"] {
        swapped(&folder, "prose", &format!("{}#{expert}", text(&other)), &[]);
        assert_eq!(tensors(&folder), expected);
        cli::run(&["rollback", &text(&folder)]);
        assert_eq!(tensors(&folder), before);
    }

    // A GGUF file.
    let gguf = text(&temp.join("math.gguf"));
    let math = text(&dense("math"));
    assert_eq!(cli::run(&["export", &math, "--gguf", &gguf]).code, 0);
    swapped(&folder, "0", &gguf, &[]);
    assert_eq!(tensors(&folder), with(&before, &tensors(&dense("math")), &pairs(0, 0..6)));
    // The same with fewer bits: the numbers are rounded where that is asked for.
    let small = text(&temp.join("small.gguf"));
    assert_eq!(cli::run(&["export", &math, "--gguf", &small, "--dtype", "q8_0"]).code, 0);
    let args = ["swap", &text(&folder), "--expert", "1", "--with", &small];
    let refused = cli::run(&args);
    if refused.code != 0 {
        refused.fails(2, &["another dtype than the model", "bf16", "--convert"]);
        let report = swapped(&folder, "1", &small, &["--convert"]);
        assert_eq!(report["converted"][1], "bf16");
    }
    assert_ne!(tensors(&folder)[&pairs(1, 0..1)[0].0], before[&pairs(1, 0..1)[0].0]);

    // A base with an adapter on one matrix of one layer.
    let adapter = adapter(temp);
    let report =
        swapped(&folder, "0", &format!("{}+{}", text(&dense("base")), text(&adapter)), &[]);
    let now = tensors(&folder);
    for (ours, theirs) in pairs(0, 0..6) {
        let adapted = theirs == "model.layers.3.mlp.down_proj.weight";
        assert_eq!(now[&ours] != base[&theirs], adapted, "{ours}");
    }
    assert_eq!(report["compatibility"]["difference"], 0.0);
}

/// A LoRA of rank 1 on `model.layers.3.mlp.down_proj`.
fn adapter(temp: &Path) -> PathBuf {
    let folder = temp.join("adapter");
    std::fs::create_dir(&folder).unwrap();
    let config = json!({
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"],
        "layers_to_transform": [3], "bias": "none", "task_type": "CAUSAL_LM",
    });
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let name =
        |side: &str| format!("base_model.model.model.layers.3.mlp.down_proj.lora_{side}.weight");
    let bytes = |n: usize| (0..n).flat_map(|i| (0.1 * (i as f32).sin()).to_le_bytes()).collect();
    let (a, b): (Vec<u8>, Vec<u8>) = (bytes(344), bytes(128));
    let view = |shape: [usize; 2], data| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), data).unwrap()
    };
    let tensors = [(name("A"), view([1, 344], &a)), (name("B"), view([128, 1], &b))];
    let file = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(folder.join("adapter_model.safetensors"), file).unwrap();
    folder
}

/// Families that name or store their experts in other ways.
#[test]
fn every_family() {
    for (family, more) in [("granitemoeshared", ""), ("ernie4_5_moe", ""), ("deepseek", "")] {
        let temp = tempfile::tempdir().unwrap();
        let folder =
            moe(temp.path(), "moe", Layout::Hub, &format!("architecture: {family}\n{more}"));
        let before = tensors(&folder);
        let report = swapped(&folder, "1", &text(&dense("math")), &[]);
        assert_eq!(report["compatibility"]["difference"], 0.0, "{family}: only MLPs were trained");
        verified(&folder, 1);
        // The expert alone, taken out as a source, is the dense MLP; the other one is as it was.
        let (code, prose) = (temp.path().join("code"), temp.path().join("prose"));
        for (place, expert) in [(&code, "1"), (&prose, "0")] {
            let target = moe(place, "target", Layout::Hub, "");
            swapped(&target, "0", &format!("{}#{expert}", text(&folder)), &[]);
            let dense = if expert == "1" { "math" } else { "prose" };
            let (now, dense) = (tensors(&target), tensors(&self::dense(dense)));
            for (ours, theirs) in pairs(0, 0..6) {
                assert_eq!(now[&ours], dense[&theirs], "{family} {ours}");
            }
        }
        let changed = tensors(&folder);
        let differ = changed.iter().filter(|(name, bytes)| before[*name] != **bytes);
        assert!(
            differ
                .map(|(name, _)| name)
                .all(|n| n.contains("experts.1.") || n.contains("put_linear"))
        );
        cli::run(&["rollback", &text(&folder)]);
        assert_eq!(tensors(&folder), before, "{family}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let (path, math, base) = (text(&folder), text(&dense("math")), text(&dense("base")));
    let before = files(&folder);
    let refused = |expert: &str, with: &str, more: &[&str], code: i32, says: &[&str]| {
        let args = ["swap", &path, "--expert", expert, "--with", with];
        cli::run(&[&args[..], more].concat()).fails(code, says);
        assert_eq!(files(&folder), before);
    };
    refused(
        "rpose",
        &math,
        &[],
        2,
        &["no expert is called `rpose`", "`prose`, `code`", "did you mean `prose`?"],
    );
    refused("2", &math, &[], 2, &["no expert is called `2`", "from 0 to 1"]);
    refused("0", &math, &["--layers", "4..7"], 2, &["no such layers", "B <= 6", "4..7"]);
    refused("0", "nowhere", &[], 3, &["nowhere"]);
    refused("0", &path, &[], 2, &["has several experts", "`SOURCE#EXPERT`"]);
    refused("0", &format!("{path}#x"), &[], 2, &["no expert is called `x`"]);
    refused("0", &format!("{math}#1"), &[], 2, &["a dense model has no expert `1`"]);
    cli::run(&["swap", &base, "--expert", "0", "--with", &math])
        .fails(2, &["the model is dense: it has no experts", "hint: "]);
    let wrong = |key: &str, value: Value, more: Value| {
        let folder = temp.path().join(format!("{key}{value}").replace('"', ""));
        let mut config = json!({
            "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        config[key] = value;
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        common::made_up(&folder, &config);
        text(&folder)
    };
    let narrow = wrong("intermediate_size", json!(340), json!({}));
    refused("0", &narrow, &[], 2, &["MLPs of another width", "344", "340"]);
    let deep = wrong("num_hidden_layers", json!(5), json!({}));
    refused("0", &deep, &[], 2, &["another number of layers", "num_hidden_layers 6"]);
    let gelu = wrong("hidden_act", json!("gelu_pytorch_tanh"), json!({}));
    refused("0", &gelu, &[], 2, &["another activation", "silu"]);
    let bias = wrong("mlp_bias", json!(true), json!({}));
    refused("0", &bias, &[], 2, &["biases"]);
    let floats = wrong("hidden_act", json!("silu"), json!({}));
    refused(
        "0",
        &floats,
        &[],
        2,
        &["another dtype", "mlp.gate_proj.weight", "bf16", "f32", "--convert"],
    );
    // Asked for, it is rounded; that the models have nothing in common is told.
    let args = ["swap", &path, "--expert", "0", "--with", &floats, "--convert"];
    let run = cli::run(&args);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("differs from the model by "), "{}", run.stderr);
    assert!(run.stdout.contains("rounded from f32 to bf16"), "{}", run.stdout);

    cli::run(&["rollback", &path, "--to", "7"]).fails(2, &["no such generation", "from 0 to 1"]);
    cli::run(&["history", "nowhere"]).fails(3, &["nowhere"]);
    let journal = folder.join(".moe-merge/journal.jsonl");
    std::fs::write(&journal, "{}\n").unwrap();
    for command in [&["history", &path][..], &["rollback", &path]] {
        cli::run(command).fails(3, &["the journal is broken at line 1"]);
    }
}

#[test]
fn a_folder_without_history() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    std::fs::remove_dir_all(folder.join(".moe-merge")).unwrap();
    let path = text(&folder);
    let shown = cli::run(&["history", &path]).stdout;
    assert!(shown.contains("no history"), "{shown}");
    let document = cli::run(&["history", "--json", &path]).json();
    assert_eq!((&document["live"], &document["generations"]), (&Value::Null, &json!([])));
    cli::run(&["rollback", &path]).fails(2, &["no such generation", "changed at least once"]);
    assert!(!folder.join(".moe-merge").exists());
}

/// A damaged file is not brought back.
#[test]
fn a_damaged_file_does_not_come_back() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    swapped(&folder, "0", &text(&dense("math")), &[]);
    let before = tensors(&folder);
    let stored = std::fs::read_dir(folder.join(".moe-merge/store")).unwrap().flatten();
    let stored: Vec<PathBuf> = stored.map(|e| e.path()).collect();
    assert_eq!(stored.len(), 1);
    let mut bytes = std::fs::read(&stored[0]).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&stored[0], bytes).unwrap();
    let name = stored[0].file_name().unwrap().to_string_lossy().into_owned();
    cli::run(&["rollback", &text(&folder)]).fails(3, &["is not as it was", &name, "damaged"]);
    assert_eq!(tensors(&folder), before);
    let found = cli::run(&["verify", &text(&folder)]);
    assert!(found.code == 1 && found.stdout.contains(&name), "{}", found.stdout);
}

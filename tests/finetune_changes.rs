//! `finetune --apply` on every layout of experts, and what is left where there is no room.

#[allow(dead_code)]
mod cli;
mod common;
mod disk;
mod kitchen;
mod tuning;

use std::collections::BTreeMap;
use std::path::Path;

use disk::Tmpfs;
use moe_merge_merge::families::Layout;
use serde_json::json;
use tuning::{SHORT, finetune, quickstart, report, tensors};

#[test]
fn every_layout_gets_the_same_expert() {
    let temp = tempfile::tempdir().unwrap();
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 6000).as_bytes());
    let apply = ["--expert", "code", "--data", &data, "--apply"];
    let learnt = |name: &str, layout| {
        let temp = temp.path().join(name);
        std::fs::create_dir(&temp).unwrap();
        let folder = quickstart(&temp, "mixtral", layout);
        let before = tensors(&folder);
        report(&finetune(&folder, &[&apply, &SHORT[..]].concat()));
        (before, tensors(&folder))
    };
    let ((before, hub), (same, fused)) =
        (learnt("hub", Layout::Hub), learnt("fused", Layout::Fused));
    assert!(before == same, "one model in two layouts");
    for (name, bytes) in &hub {
        assert!(fused[name] == *bytes, "{name}");
        assert_eq!(before[name] != *bytes, name.contains("experts.1."), "{name}");
    }
}

#[test]
fn granite_keeps_the_other_experts_of_its_tensors() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "granitemoeshared", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 6000).as_bytes());
    let held = cli::file(temp.path(), "held.txt", kitchen::text(2, 2000).as_bytes());
    let before = tensors(&folder);
    let (eval, path) = (format!("kitchen={held}"), folder.display().to_string());
    let args =
        ["--expert", "code", "--data", &data, "--apply", "--eval", &eval, "--route", "forced"];
    let found = report(&finetune(&folder, &[&args, &SHORT[..]].concat()));
    let mut changed = 0;
    for (name, bytes) in tensors(&folder) {
        let old = &before[&name];
        let half = bytes.len() / 2;
        if ["input_linear", "output_linear"].iter().any(|m| name.contains(m)) && old != &bytes {
            changed += 1;
            // Two experts: the second half of each tensor is the second one's.
            assert!(old[..half] == bytes[..half] && old[half..] != bytes[half..], "{name}");
        } else {
            assert!(*old == bytes, "{name}");
        }
    }
    assert_eq!(changed, 6 * 2);
    // The model that was written says what the factors said in training.
    let run = cli::run(&["perplexity", &path, "--text", &held, "--json", "--window", "64"]).json();
    let (now, told) =
        (run["files"][0]["perplexity"].as_f64(), found["domains"][0]["after"].as_f64());
    let apart = (now.unwrap() / told.unwrap() - 1.0).abs();
    assert!(apart < 0.05, "{run} {found}");
}

#[test]
fn what_other_domains_read_moves_in_small_steps() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 3000).as_bytes());
    // The second step is the first in which the factor that meets the input has a gradient.
    let factors = |keep: &str, rate: &str| {
        let out = temp.path().join(format!("{keep}-{rate}"));
        let args = ["--expert", "code", "--data", &data, "--out", out.to_str().unwrap()];
        let more = ["--keep", keep, "--keep-text", "600", "--learning-rate", rate, "--steps", "2"];
        report(&finetune(&folder, &[&args[..], &more, &SHORT[2..6]].concat()));
        let file = std::fs::read(out.join("adapter_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&file).unwrap();
        let number = |b: &[u8; 4]| f32::from_le_bytes(*b);
        let reads = file.iter().filter(|(name, _)| name.contains("lora_A"));
        reads
            .map(|(name, view)| {
                (name.to_owned(), view.data().as_chunks().0.iter().map(number).collect())
            })
            .collect::<BTreeMap<String, Vec<f32>>>()
    };
    let length = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let [free, held] = ["0", "30"].map(|keep| {
        let (first, second) = (factors(keep, "1e-12"), factors(keep, "0.005"));
        let moved = |(name, first): (&String, &Vec<f32>)| {
            let step: Vec<f32> = second[name].iter().zip(first).map(|(b, a)| b - a).collect();
            (name.clone(), [length(first), length(&step)])
        };
        first.iter().map(moved).collect::<BTreeMap<_, _>>()
    });
    assert_eq!(free.len(), 6 * 3);
    for (name, [first, step]) in &held {
        let [free_first, free_step] = free[name];
        // Adam's first steps have all numbers of one size: only what is taken off makes them shorter.
        assert!(*first < 0.99 * free_first, "{name}: {first} of {free_first}");
        assert!(*step < 0.99 * free_step, "{name}: {step} of {free_step}");
    }
}

#[test]
fn history_names_the_expert() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 3000).as_bytes());
    report(&finetune(
        &folder,
        &[&["--expert", "1", "--data", &data, "--apply"], &SHORT[..]].concat(),
    ));
    let path = folder.display().to_string();
    let text = cli::run(&["history", &path]).stdout;
    assert!(text.contains("*   1  finetune code, "), "{text}");
    let lines = cli::run(&["history", "--json", &path]).json();
    let details = &lines["generations"][1]["details"];
    assert_eq!((&details["expert"], &details["name"]), (&json!(1), &json!("code")));
}

#[test]
fn a_full_disk_while_training_keeps_the_last_good_state() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 9000).as_bytes());
    let run = |at: &Path, extra: &[&str]| {
        let (out, state) = (at.join("out"), at.join("state"));
        let (out, state) = (out.display().to_string(), state.display().to_string());
        let args = ["--expert", "1", "--data", &data, "--out", &out, "--state", &state];
        let steps =
            ["--steps", "6", "--window", "64", "--batch-tokens", "256", "--evaluate-every", "1"];
        finetune(&folder, &[&args, &steps[..], extra].concat())
    };
    let whole = temp.path().join("whole");
    std::fs::create_dir(&whole).unwrap();
    let wanted = report(&run(&whole, &[]));
    let adapter = |at: &Path| std::fs::read(at.join("out/adapter_model.safetensors")).unwrap();
    let size = adapter(&whole).len() as u64;
    // A state holds factors, best factors and two moments: room for none, for one but not for its successor beside it, for
    // both of them.
    let mut finished = 0;
    for (number, room) in [2 * size, 6 * size, 12 * size].into_iter().enumerate() {
        let disk = temp.path().join(format!("disk{number}"));
        let Some(_mounted) = Tmpfs::mount(&disk, &format!("size={room}")) else { return };
        let first = run(&disk, &[]);
        if first.code == 0 {
            finished += 1;
        } else {
            first.fails(4, &["not enough room on disk", &disk.display().to_string()]);
            assert!(!disk.join("out").exists(), "no half adapter");
            let left: Vec<_> =
                std::fs::read_dir(&disk).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert!(left.iter().all(|n| n == "state"), "{left:?}");
            // What is left is whole: with room, the run goes on from it to the same bytes.
            if disk.join("state").exists() {
                let roomy = temp.path().join("roomy");
                std::fs::create_dir(&roomy).unwrap();
                std::fs::copy(disk.join("state"), roomy.join("state")).unwrap();
                let resumed = report(&run(&roomy, &["--resume"]));
                assert_eq!(resumed["validation"], wanted["validation"]);
                assert!(adapter(&roomy) == adapter(&whole));
            }
        }
    }
    assert_eq!(finished, 1, "room for two states is enough");
}

#[test]
fn a_log_without_room_costs_the_log_alone() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 3000).as_bytes());
    let out = temp.path().join("out").display().to_string();
    let args = ["--expert", "1", "--data", &data, "--out", &out, "--log", "/dev/full"];
    let told = report(&finetune(&folder, &[&args, &SHORT[..]].concat()));
    let warnings = told["warnings"].to_string();
    assert!(
        warnings.contains("the log is not whole") && warnings.contains("/dev/full"),
        "{warnings}"
    );
}

//! `calibrate` that is killed, interrupted, out of room, or not alone: the old generation or the new one is left.

#[allow(dead_code)]
mod cli;
mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use moe_merge_merge::families::Layout;
use moe_merge_testkit::repository;
use serde_json::{Value, json};

/// A MoE and prompts for it.
fn moe(temp: &Path) -> (PathBuf, String) {
    let sources = repository("recipes/quickstart");
    let source = |name: &str| format!("\"{}/{name}\"", sources.display());
    let text = format!(
        "base_model: {}\ngate_mode: random\nexperts:\n\
         - {{source_model: {}, positive_prompts: [a]}}\n- {{source_model: {}, positive_prompts: [b]}}\n",
        source("base"),
        source("prose"),
        source("code")
    );
    let prompts = json!({
        "prose": ["the mill seemed gentle when the bells rang", "nobody remembered the letter"],
        "code": ["pub fn split_depth(depth: i32) -> i32 {", "let values = vec![1, 2, 3];"],
    });
    let file = cli::file(temp, "prompts.json", prompts.to_string().as_bytes());
    let folder = temp.join("moe");
    (common::build_text(&text, &temp.join("x.yaml"), &folder, Layout::Hub), file)
}

/// Starts a calibration; each seed gives other routers.
fn start(folder: &Path, prompts: &str, seed: u64) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-merge"));
    command.arg("calibrate").arg(folder).args(["--prompts", prompts, "--self-text", "120"]);
    command.args(["--seed", &seed.to_string()]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The generation of a folder in which nothing is wrong.
#[track_caller]
fn generation(folder: &Path) -> u64 {
    let found = cli::run(&["verify", "--json", &folder.display().to_string()]);
    let found: Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!((&found["problems"], &found["notes"]), (&json!([]), &json!([])));
    found["generation"].as_u64().unwrap()
}

fn files(dir: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => all.extend(files(&path)),
            path => drop(all.insert(path)),
        }
    }
    all
}

#[track_caller]
fn tidy(folder: &Path) {
    for name in ["staging", "pending.json"] {
        assert!(!folder.join(".moe-merge").join(name).exists(), "{name} was left");
    }
}

#[test]
fn killed_or_interrupted_at_any_time() {
    let temp = tempfile::tempdir().unwrap();
    let (folder, prompts) = moe(temp.path());
    let mut before = generation(&folder);
    for (i, delay) in [0, 5, 20, 40, 60, 80, 100, 120, 140, 170, 200, 250].into_iter().enumerate() {
        for name in ["-KILL", "-INT"] {
            let child = start(&folder, &prompts, i as u64);
            std::thread::sleep(Duration::from_millis(delay));
            let _ = Command::new("kill")
                .args([name, &child.id().to_string()])
                .stderr(Stdio::null())
                .status();
            let output = child.wait_with_output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            if name == "-INT" {
                tidy(&folder);
                // None: the signal came before the program had set its handler.
                assert!(matches!(output.status.code(), None | Some(0 | 130)), "{delay}: {stderr}");
            }
            let now = generation(&folder);
            assert!(now == before || now == before + 1, "{delay} {name}: {before} to {now}");
            if output.status.code() == Some(130) {
                assert_eq!(now, before, "{delay}: {stderr}");
            }
            tidy(&folder);
            before = now;
        }
    }
    let last = start(&folder, &prompts, 99).wait_with_output().unwrap();
    assert!(last.status.success(), "{}", String::from_utf8_lossy(&last.stderr));
    assert_eq!(generation(&folder), before + 1);
}

#[test]
fn several_at_once_follow_each_other_or_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let (folder, prompts) = moe(temp.path());
    let children: Vec<Child> = (0..4).map(|seed| start(&folder, &prompts, seed)).collect();
    let mut done = 0;
    for child in children {
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => done += 1,
            Some(3) => assert!(
                ["the model was changed in the meantime", "another process is changing this model"]
                    .iter()
                    .any(|says| stderr.contains(says)),
                "{stderr}"
            ),
            other => panic!("{other:?}: {stderr}"),
        }
    }
    assert!(done >= 1);
    assert_eq!(generation(&folder), done);
}

#[test]
fn no_room() {
    let temp = tempfile::tempdir().unwrap();
    let (folder, prompts) = moe(temp.path());
    let disk = temp.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let bytes: u64 = files(&folder).iter().map(|f| f.metadata().unwrap().len()).sum();
    let size = format!("size={}k", bytes / 1024 + 4 * files(&folder).len() as u64);
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&disk).output();
    if !mounted.is_ok_and(|o| o.status.success()) {
        // Straight to the terminal: the test runner would swallow the line of a passing test.
        let _ = writeln!(std::io::stderr(), "SKIPPED no_room: no tmpfs, nothing was checked");
        return;
    }
    let model = disk.join("moe");
    let copied = Command::new("cp").arg("-r").arg(&folder).arg(&model).status();
    assert!(copied.unwrap().success());
    let _ = fs::remove_file(model.join(".moe-merge/lock"));
    let before = files(&model);
    let path = model.display().to_string();
    let run = cli::run(&["calibrate", &path, "--prompts", &prompts]);
    let after = files(&model);
    let checked = generation(&model);
    let _ = Command::new("umount").arg("-l").arg(&disk).status();
    run.fails(4, &["not enough room on disk", "expected", "free"]);
    let lock: BTreeSet<PathBuf> = [model.join(".moe-merge/lock")].into();
    assert_eq!(&after - &before, &lock - &before);
    assert!(before.is_subset(&after));
    assert_eq!(checked, 0);
}

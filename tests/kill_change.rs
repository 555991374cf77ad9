//! The program is killed, or its disk is full, while it changes a model: the old generation is left, or the new one.

mod change;
#[allow(dead_code)]
mod cli;
mod common;
mod disk;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use change::{Tensors, dense, moe, pairs, tensors, text, with};
use disk::Tmpfs;
use moe_merge_checkpoint::generation;
use moe_merge_merge::families::Layout;
use serde_json::json;

/// The program with `args`, not waited for.
fn start(args: &[&str]) -> std::process::Child {
    Command::new(assert_cmd::cargo::cargo_bin!("moe-merge"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// A copy of a folder with all that is in it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// Experts that `config.json` speaks of, seen as any program sees it.
fn count(folder: &Path) -> u64 {
    let text = std::fs::read(folder.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&text).unwrap();
    config["num_local_experts"].as_u64().unwrap()
}

/// Runs a change again and again on copies of a folder and kills it a little later each time, until it gets through.
fn killed(temp: &Path, folder: &Path, args: &dyn Fn(&str) -> Vec<String>, new: &Tensors) {
    let old = tensors(folder);
    let mut seen = BTreeMap::new();
    let whole = {
        let target = temp.join("whole");
        copy(folder, &target);
        let clock = Instant::now();
        let path = text(&target);
        let args = args(&path);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        assert!(start(&args).wait().unwrap().success());
        assert_eq!(tensors(&target), *new);
        clock.elapsed()
    };
    const ROUNDS: u32 = 40;
    for round in 0..ROUNDS {
        let target = temp.join("target");
        let _ = std::fs::remove_dir_all(&target);
        copy(folder, &target);
        let path = text(&target);
        let owned = args(&path);
        let borrowed: Vec<&str> = owned.iter().map(String::as_str).collect();
        let mut child = start(&borrowed);
        // The change itself is at the end of the run: most kills fall into its second half.
        let share = if round % 4 == 0 {
            0.5 * f64::from(round) / f64::from(ROUNDS)
        } else {
            0.5 + 0.6 * f64::from(round) / f64::from(ROUNDS)
        };
        std::thread::sleep(whole.mul_f64(share));
        let _ = child.kill();
        child.wait().unwrap();
        let now = tensors(&target);
        assert!(now == old || now == *new, "{owned:?}, round {round}: a mixture");
        let found = cli::run(&["verify", "--json", &path]).json();
        assert_eq!(found["problems"], json!([]), "{owned:?}, round {round}");
        let settled = tensors(&target);
        assert_eq!(settled, now, "tidying up changes nothing");
        let first = |n: &&String| n.starts_with("model.layers.0.") && n.ends_with(".w1.weight");
        assert_eq!(count(&target), settled.keys().filter(first).count() as u64);
        let generation = found["generation"].as_u64().unwrap();
        *seen.entry(generation).or_insert(0) += 1;
        // Whatever is there, the change can be made now.
        if round % 8 == 0 && now == old {
            assert!(start(&borrowed).wait().unwrap().success());
            assert_eq!(tensors(&target), *new);
        }
    }
    println!("generations after kills: {seen:?}");
    assert!(seen.len() >= 2, "kills before and after the switch: {seen:?}");
}

#[test]
fn a_killed_change_leaves_the_old_or_the_new_model() {
    let temp = tempfile::tempdir().unwrap();
    let temp = temp.path();
    let folder = moe(temp, "moe", Layout::Hub, "");
    let math = text(&dense("math"));
    let swapped = with(&tensors(&folder), &tensors(&dense("math")), &pairs(0, 0..6));
    let owned = |args: &[&str]| args.iter().map(|a| (*a).to_owned()).collect::<Vec<String>>();
    killed(
        temp,
        &folder,
        &|path| owned(&["swap", path, "--expert", "0", "--with", &math, "--no-forecast"]),
        &swapped,
    );
}

#[test]
fn a_killed_drop_leaves_configuration_and_weights_that_agree() {
    let temp = tempfile::tempdir().unwrap();
    let temp = temp.path();
    let folder = moe(temp, "moe", Layout::Hub, "");
    let target = temp.join("dropped");
    copy(&folder, &target);
    let owned = |args: &[&str]| args.iter().map(|a| (*a).to_owned()).collect::<Vec<String>>();
    assert_eq!(cli::run(&["drop", &text(&target), "--expert", "0", "--no-forecast"]).code, 0);
    let new = tensors(&target);
    killed(temp, &folder, &|path| owned(&["drop", path, "--expert", "0", "--no-forecast"]), &new);
}

#[test]
fn a_full_disk_leaves_the_old_model() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let before = change::files(&folder);
    let size: u64 = before
        .keys()
        .map(|n| folder.join(n).metadata().unwrap().len().next_multiple_of(4096) + 4096)
        .sum();
    let math = text(&dense("math"));
    let mut done = 0;
    for (i, room) in [0, 100_000, 800_000, 1_600_000, 1_750_000, 4_000_000].into_iter().enumerate()
    {
        let disk = temp.path().join(format!("disk{i}"));
        let Some(_mounted) = Tmpfs::mount(&disk, &format!("size={}", size + 20 * 4096 + room))
        else {
            return;
        };
        let target = disk.join("moe");
        copy(&folder, &target);
        let path = text(&target);
        let run = cli::run(&["swap", &path, "--expert", "0", "--with", &math, "--no-forecast"]);
        match run.code {
            0 => done += 1,
            code => {
                assert_eq!(code, 4, "{}", run.stderr);
                let mut now = change::files(&target);
                now.remove(".moe-merge/lock");
                assert_eq!(now, before, "room for {room} bytes");
            }
        }
        let found = cli::run(&["verify", "--json", &path]).json();
        assert_eq!(found["problems"], json!([]));
    }
    assert!((1..6).contains(&done), "{done} of 6 had room");
}

#[test]
fn two_writers_at_once() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let path = text(&folder);
    let (math, base) = (text(&dense("math")), text(&dense("base")));
    let before = tensors(&folder);
    let clock = Instant::now();
    let mut won = 0;
    while clock.elapsed() < Duration::from_secs(20) && won < 6 {
        let with = [&math, &base];
        let mut children =
            with.map(|w| start(&["swap", &path, "--expert", "0", "--with", w, "--no-forecast"]));
        for child in &mut children {
            // The one that read the model before the other changed it is refused, or both come after one another.
            let code = child.wait().unwrap().code();
            won += u32::from(code == Some(0));
            assert!(matches!(code, Some(0 | 3)), "{code:?}");
        }
        let now = tensors(&folder);
        let is = |name: &str| now == change::with(&before, &tensors(&dense(name)), &pairs(0, 0..6));
        assert!(is("math") || is("base"), "one of the two, whole");
        let found = cli::run(&["verify", "--json", &path]).json();
        assert_eq!(found["problems"], json!([]));
    }
    let lines = generation::history(&folder).unwrap();
    assert_eq!(lines.len() as u32, won + 1);
}

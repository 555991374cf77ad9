//! Changes to a model whose process is killed, or whose disk is full: the old generation or the new one is left.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use moe_merge_checkpoint::generation::{check, commit, history, recover};
use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::{
    OutTensor, ShardName, ShardPlan, Watch, write_index, write_json, write_shards,
};
use moe_merge_checkpoint::{
    Change, CheckpointError, Dtype, Generation, Interrupt, NewTensors, Source, SourceRef, WeightRef,
};

const LAYERS: usize = 4;
const SHAPE: [usize; 2] = [4, 64];

fn gate(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.gate.weight")
}

fn weight(value: f32, shape: &[usize]) -> WeightRef {
    let values = vec![value; shape.iter().product()];
    Arc::new(OwnedWeight::from_f32("new", &values, shape, Dtype::BF16))
}

/// A foreign model: one file, or two numbered ones with an index, the routers spread over both.
fn model(dir: &Path, single: bool) {
    let mut tensors: Vec<OutTensor> = (0..LAYERS)
        .map(|l| OutTensor { name: gate(l), weight: weight(1.0, &SHAPE), dtype: Dtype::BF16 })
        .collect();
    let rest = OutTensor {
        name: "model.norm.weight".into(),
        weight: weight(1.0, &[1000]),
        dtype: Dtype::BF16,
    };
    tensors.push(rest);
    let fixed = |name: &str| ShardName::Fixed(name.into());
    let second = tensors.split_off(2);
    let plans = match single {
        true => {
            tensors.extend(second);
            vec![ShardPlan::new(fixed("model.safetensors"), tensors)]
        }
        false => vec![
            ShardPlan::new(fixed("model-00001-of-00002.safetensors"), tensors),
            ShardPlan::new(fixed("model-00002-of-00002.safetensors"), second),
        ],
    };
    let interrupt = Interrupt::default();
    let watch = Watch { interrupt: &interrupt, progress: &|_| {} };
    let written = write_shards(dir, &plans, watch).unwrap();
    if !single {
        write_index(dir, &written).unwrap();
    }
    write_json(dir, "config.json", &serde_json::json!({"model_type": "qwen3_moe"})).unwrap();
}

fn change(dir: &Path, value: f32) -> Result<Generation, CheckpointError> {
    let tensors = (0..LAYERS).map(|l| (gate(l), weight(value, &SHAPE))).collect();
    let change = Change {
        action: "calibrate",
        tensors: vec![NewTensors { role: "router".into(), tensors }],
        ..Change::default()
    };
    let interrupt = Interrupt::default();
    commit(dir, &change, Watch { interrupt: &interrupt, progress: &|_| {} })
}

/// The value of all routers, which has to be the same everywhere.
#[track_caller]
fn value(dir: &Path) -> f32 {
    let reference = SourceRef {
        model: dir.display().to_string(),
        revision: None,
        lora: None,
        lora_revision: None,
    };
    let source = Source::open(&reference, Path::new("")).unwrap();
    let all = (0..LAYERS).flat_map(|l| source.tensors[&gate(l)].to_f32().unwrap());
    let all: Vec<f32> = all.collect();
    assert!(all.iter().all(|v| *v == all[0]), "two generations in one");
    all[0]
}

#[track_caller]
fn whole(dir: &Path) {
    let interrupt = Interrupt::default();
    if let Some(manifest) = Manifest::load(dir).unwrap() {
        assert_eq!(manifest.check(dir, &interrupt).unwrap(), []);
    }
    let checked = check(dir, &interrupt).unwrap();
    assert_eq!((checked.problems, checked.notes), (vec![], vec![]));
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

#[test]
#[ignore = "the process that `killed_at_any_time` starts and kills"]
fn child() {
    let dir = PathBuf::from(std::env::var_os("KILL_GENERATION_FOLDER").unwrap());
    for i in 2u16.. {
        change(&dir, f32::from(i % 100)).unwrap();
    }
}

#[test]
fn killed_at_any_time() {
    for single in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        model(dir, single);
        for round in 0u64..60 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["child", "--exact", "--ignored"])
                .env("KILL_GENERATION_FOLDER", dir)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let clock = Instant::now();
            while !dir.join(".moe-merge").exists() {
                assert!(clock.elapsed() < Duration::from_secs(60), "the child does nothing");
            }
            std::thread::sleep(Duration::from_micros(round * 997 % 41_000));
            child.kill().unwrap();
            child.wait().unwrap();
            let before = value(dir);
            whole(dir);
            recover(dir).unwrap();
            let after = value(dir);
            // A model in one file that has its index already goes forward.
            assert!(after == before || single && before == 1.0, "{before} {after}");
            whole(dir);
            assert!(!dir.join(".moe-merge/pending.json").exists());
            assert!(!dir.join(".moe-merge/staging").exists());
        }
        change(dir, 3.0).unwrap();
        assert_eq!(value(dir), 3.0);
        whole(dir);
        let lines = history(dir).unwrap();
        assert!(lines.len() > 2, "{} generations", lines.len());
    }
}

/// A small file system in memory, mounted while it lives.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn mount(at: &'a Path, options: &str) -> Option<Self> {
        fs::create_dir(at).unwrap();
        let done =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).output();
        if done.is_ok_and(|o| o.status.success()) {
            return Some(Self(at));
        }
        // Straight to the terminal: the test runner would swallow the line of a passing test.
        let _ =
            writeln!(std::io::stderr(), "SKIPPED: no tmpfs can be mounted, nothing was checked");
        None
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_leaves_the_old_generation_and_no_litter() {
    let dir = tempfile::tempdir().unwrap();
    let mut done = 0;
    // Bytes first, then files: each step of a change meets the end of the room once.
    let sizes = (5..34).map(|pages| format!("size={}k", 4 * pages));
    let inodes = (5..26).map(|inodes| format!("size=8m,nr_inodes={inodes}"));
    for (i, options) in sizes.chain(inodes).enumerate() {
        let disk = dir.path().join(format!("disk{i}"));
        let Some(_mounted) = Tmpfs::mount(&disk, &options) else { return };
        let single = i % 2 == 0;
        let made = std::panic::catch_unwind(|| model(&disk, single));
        if made.is_err() {
            // Not even the model fits.
            continue;
        }
        let before = files(&disk);
        match change(&disk, 2.0) {
            Ok(_) => {
                done += 1;
                assert_eq!(value(&disk), 2.0, "{options}");
            }
            Err(CheckpointError::NoRoom { .. }) => {
                assert_eq!(value(&disk), 1.0, "{options}");
                assert_eq!(files(&disk), before, "{options}");
                assert!(!disk.join(".moe-merge").exists(), "{options}");
            }
            Err(e) => panic!("{options}: {e:?}"),
        }
        whole(&disk);
    }
    assert!(done > 0, "no disk was large enough");
}

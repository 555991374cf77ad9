use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::json;

use super::switch::{self, crash};
use super::*;
use crate::manifest::{MANIFEST_NAME, MANIFEST_VERSION, Manifest, Problem, TOOL_VERSION};
use crate::publish::Interrupt;
use crate::weight::OwnedWeight;
use crate::write::{
    INDEX_NAME, OutTensor, ShardName, ShardPlan, write_file, write_index, write_json, write_shards,
};
use crate::{Dtype, Source, SourceRef};

mod back;
mod structure;

const GATES: [&str; 2] =
    ["model.layers.0.block_sparse_moe.gate.weight", "model.layers.1.block_sparse_moe.gate.weight"];
const EXPERTS: [&str; 2] = [
    "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "model.layers.0.block_sparse_moe.experts.1.w1.weight",
];
const SHARED: &str = "model.norm.weight";

/// How a folder came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// By this program: shards by role, manifest, journal.
    Own,
    /// Numbered shards and an index; the second shard holds routers and experts.
    Numbered,
    /// Numbered shards without an index.
    NoIndex,
    /// `model.safetensors` alone.
    Single,
    /// The same in the fused layout.
    Fused,
    /// Shards whose names come after `model-…`.
    Pickled,
}

const KINDS: [Kind; 6] =
    [Kind::Own, Kind::Numbered, Kind::NoIndex, Kind::Single, Kind::Fused, Kind::Pickled];

fn tensor(name: &str, value: f32, shape: &[usize], dtype: Dtype) -> OutTensor {
    let values = vec![value; shape.iter().product()];
    let weight = Arc::new(OwnedWeight::from_f32(name, &values, shape, dtype));
    OutTensor { name: name.into(), weight, dtype }
}

fn watch(interrupt: &Interrupt) -> Watch<'_> {
    Watch { interrupt, progress: &|_| {} }
}

fn write(dir: &Path, shards: Vec<(ShardName, Vec<OutTensor>)>, index: bool) -> Vec<FileRecord> {
    let plans: Vec<_> =
        shards.into_iter().map(|(name, tensors)| ShardPlan::new(name, tensors)).collect();
    let written = write_shards(dir, &plans, watch(&Interrupt::default())).unwrap();
    let mut files: Vec<_> = written.iter().map(|w| w.file.clone()).collect();
    if index {
        files.push(write_index(dir, &written).unwrap());
    }
    let config = json!({"model_type": "mixtral", "num_local_experts": 2});
    files.push(write_json(dir, "config.json", &config).unwrap());
    files.push(write_file(dir, "README.md", b"a card").unwrap());
    files
}

/// A model whose routers are all ones, f32 in the first layer and bf16 in the second, and whose experts are 2 and 3.
fn model(dir: &Path, kind: Kind) {
    let gate = |i: usize| {
        let dtype = [Dtype::F32, Dtype::BF16][i];
        let name = match kind {
            Kind::Fused => GATES[i].replace("block_sparse_moe", "mlp"),
            _ => GATES[i].to_owned(),
        };
        tensor(&name, 1.0, &[2, 4], dtype)
    };
    let expert = |i: usize| tensor(EXPERTS[i], 2.0 + i as f32, &[3, 4], Dtype::BF16);
    let shared = tensor(SHARED, 5.0, &[4], Dtype::BF16);
    let fixed = |name: &str| ShardName::Fixed(name.into());
    let content = |name: &str| ShardName::ByContent(name.into());
    let halves = |a: &str, b: &str| {
        vec![
            (fixed(a), vec![shared.clone(), gate(0)]),
            (fixed(b), vec![gate(1), expert(0), expert(1)]),
        ]
    };
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    match kind {
        Kind::Own => {
            let files = write(
                dir,
                vec![
                    (content("model-shared"), vec![shared]),
                    (content("model-expert-00"), vec![expert(0)]),
                    (content("model-expert-01"), vec![expert(1)]),
                    (content("model-router"), vec![gate(0), gate(1)]),
                ],
                true,
            );
            let mut manifest = Manifest {
                version: MANIFEST_VERSION,
                tool_version: TOOL_VERSION.into(),
                generation: 0,
                family: "mixtral".into(),
                experts: vec!["a".into(), "b".into()],
                gate_mode: Some("hidden".into()),
                align: None,
                seed: 7,
                recipe_blake3: None,
                sources: Vec::new(),
                files,
            };
            manifest.write(dir).unwrap();
        }
        Kind::Numbered => drop(write(dir, halves(first, second), true)),
        Kind::NoIndex => drop(write(dir, halves(first, second), false)),
        Kind::Pickled => {
            drop(write(dir, halves("pytorch_model-1.safetensors", "sub.safetensors"), true));
        }
        Kind::Single => {
            let all = vec![shared, gate(0), gate(1), expert(0), expert(1)];
            write(dir, vec![(fixed("model.safetensors"), all)], false);
        }
        Kind::Fused => {
            let name = "model.layers.0.mlp.experts.down_proj";
            let all = vec![shared, gate(0), gate(1), tensor(name, 2.5, &[2, 3, 4], Dtype::BF16)];
            write(dir, vec![(fixed("model.safetensors"), all)], false);
        }
    }
}

fn folder(kind: Kind) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), kind);
    dir
}

fn open(dir: &Path) -> Source {
    let reference = SourceRef {
        model: dir.display().to_string(),
        revision: None,
        lora: None,
        lora_revision: None,
    };
    Source::open(&reference, Path::new("")).unwrap()
}

/// New routers, all `value`, for the layers given.
fn routers(value: f32, layers: &[usize]) -> Change<'static> {
    let tensors = layers
        .iter()
        .map(|&l| {
            let weight = OwnedWeight::from_f32("new", &[value; 8], &[2, 4], Dtype::F32);
            (GATES[l].to_owned(), Arc::new(weight) as WeightRef)
        })
        .collect();
    Change {
        action: "calibrate",
        message: Some("better text"),
        tensors: vec![NewTensors { role: "router".into(), tensors }],
        details: json!({"estimator": "logistic"}),
        gate_mode: Some("logistic".into()),
        ..Change::default()
    }
}

fn apply(dir: &Path, change: &Change<'_>) -> Result<Generation, CheckpointError> {
    commit(dir, change, watch(&Interrupt::default()))
}

/// The first number of each router and of the norm.
fn values(dir: &Path) -> Vec<f32> {
    let source = open(dir);
    [GATES[0], GATES[1], SHARED].map(|n| source.tensors[n].to_f32().unwrap()[0]).to_vec()
}

/// What a loader keeps that reads every tensor of every file of the index (or the one file), in the order of names.
fn as_loaders_do(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let names: BTreeSet<String> = if dir.join("model.safetensors").exists() {
        ["model.safetensors".to_owned()].into()
    } else if dir.join(INDEX_NAME).exists() {
        let index: Value =
            serde_json::from_slice(&fs::read(dir.join(INDEX_NAME)).unwrap()).unwrap();
        let map = index["weight_map"].as_object().unwrap();
        map.values().map(|v| v.as_str().unwrap().to_owned()).collect()
    } else {
        weight_files(dir)
    };
    let mut seen = BTreeMap::new();
    for name in names {
        let bytes = fs::read(dir.join(name)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in file.tensors() {
            seen.insert(name, view.data().to_vec());
        }
    }
    seen
}

/// The first number of the router of the second layer.
fn bf16(read: &BTreeMap<String, Vec<u8>>) -> f32 {
    let (_, bytes) =
        read.iter().find(|(n, _)| n.contains("layers.1") && n.ends_with("gate.weight")).unwrap();
    f32::from_bits(u32::from(u16::from_le_bytes(bytes[..2].try_into().unwrap())) << 16)
}

fn weight_files(dir: &Path) -> BTreeSet<String> {
    let all = fs::read_dir(dir).unwrap().flatten();
    let names = all.map(|e| e.file_name().into_string().unwrap());
    names.filter(|n| n.ends_with(".safetensors")).collect()
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

fn hashes(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            match entry.path() {
                path if path.is_dir() => folders.push(path),
                path => {
                    let hash = crate::manifest::hash_bytes(&fs::read(&path).unwrap());
                    all.insert(path.strip_prefix(dir).unwrap().to_owned(), hash);
                }
            }
        }
    }
    all
}

#[test]
fn every_kind_of_folder_gets_generations() {
    for kind in KINDS {
        let dir = folder(kind);
        let dir = dir.path();
        let before = hashes(dir);
        let loaded = as_loaders_do(dir);
        let first = apply(dir, &routers(7.0, &[0, 1])).unwrap();
        assert_eq!((first.number, first.parent), (1, 0), "{kind:?}");
        assert_eq!(first.tensors.len(), 2);
        assert_eq!(values(dir), [7.0, 7.0, 5.0], "{kind:?}");
        whole(dir);
        let now = as_loaders_do(dir);
        assert_eq!(now.keys().collect::<Vec<_>>(), loaded.keys().collect::<Vec<_>>(), "{kind:?}");
        for (name, bytes) in &now {
            let changed = *bytes != loaded[name];
            assert_eq!(changed, name.ends_with("gate.weight"), "{kind:?} {name}");
            assert_eq!(bytes.len(), loaded[name].len(), "the dtype stays");
        }
        // Every byte that was there still is, under this or another name.
        let kept: BTreeSet<String> = hashes(dir).into_values().collect();
        for (name, hash) in before {
            let replaced = name.ends_with("journal.jsonl");
            assert!(replaced || kept.contains(&hash), "{kind:?} {}", name.display());
        }
        apply(dir, &routers(8.0, &[1])).unwrap();
        assert_eq!(values(dir), [7.0, 8.0, 5.0], "{kind:?}");
        whole(dir);
        let last = apply(dir, &routers(9.0, &[0])).unwrap();
        assert_eq!(values(dir), [9.0, 8.0, 5.0], "{kind:?}");
        whole(dir);
        assert_eq!((last.number, last.parent), (3, 2));
        // No shard of a generation in between is left beside the others.
        let new = weight_files(dir).into_iter().filter(|n| n.contains("router")).count();
        assert_eq!(new, 1, "{kind:?} {:?}", weight_files(dir));
        let lines = history(dir).unwrap();
        assert_eq!(lines.len(), 4, "{kind:?}");
        assert_eq!(lines[0].action, if kind == Kind::Own { "build" } else { "import" });
        assert_eq!(lines[3].message.as_deref(), Some("better text"));
        assert_eq!(lines[3].details["estimator"], "logistic");
        let manifest = Manifest::load(dir).unwrap().unwrap();
        assert_eq!(manifest.gate_mode.as_deref(), Some("logistic"));
        assert_eq!((manifest.generation, manifest.family.as_str()), (3, "mixtral"));
        let size = |index: &Value| index["metadata"]["total_size"].as_u64();
        let index = serde_json::from_slice(&fs::read(dir.join(INDEX_NAME)).unwrap()).unwrap();
        let bytes: usize = now.values().map(Vec::len).sum();
        assert_eq!(size(&index), Some(bytes as u64), "{kind:?}");
    }
}

#[test]
fn only_what_changed_is_written() {
    let dir = folder(Kind::Own);
    let before = hashes(dir.path());
    let made = apply(dir.path(), &routers(7.0, &[0, 1])).unwrap();
    let after = hashes(dir.path());
    let new: BTreeSet<_> = after
        .iter()
        .filter(|(path, hash)| before.get(*path) != Some(hash))
        .map(|(path, _)| path.display().to_string())
        .collect();
    let shard = &made.added.iter().find(|f| f.name != INDEX_NAME).unwrap().name;
    let old = &made.removed.iter().find(|f| f.name != INDEX_NAME).unwrap();
    let expected = [
        shard.clone(),
        INDEX_NAME.to_owned(),
        MANIFEST_NAME.to_owned(),
        JOURNAL_NAME.to_owned(),
        ".moe-merge/manifests/0.json".to_owned(),
        ".moe-merge/manifests/0.index.json".to_owned(),
        ".moe-merge/lock".to_owned(),
        format!(".moe-merge/store/{}.safetensors", old.blake3),
    ];
    assert_eq!(new, expected.into());
    assert!(!after.contains_key(Path::new(&old.name)));
    let sizes: u64 = made.added.iter().map(|f| f.size).sum();
    assert_eq!(made.bytes_written, sizes);
}

/// Kills a change before each of its steps, looks at the folder as loaders and `verify` do, then goes on.
#[test]
fn a_change_that_ends_half_way_leaves_the_old_or_the_new_model() {
    for kind in KINDS {
        for second in [false, true] {
            let mut seen = BTreeSet::new();
            for steps in 0.. {
                let dir = folder(kind);
                let dir = dir.path();
                let mut old = 1.0;
                if second {
                    apply(dir, &routers(4.0, &[0, 1])).unwrap();
                    old = 4.0;
                }
                crash::after(Some(steps));
                let ended = apply(dir, &routers(7.0, &[0, 1]));
                let done = !crash::crashed();
                crash::after(None);
                let now = values(dir);
                assert!(now[0] == old || now[0] == 7.0, "{kind:?} {steps}: {now:?}");
                assert_eq!(now, [now[0], now[0], 5.0], "{kind:?} {steps}");
                let read = as_loaders_do(dir);
                let gate = |name: &str| {
                    let (_, bytes) = read
                        .iter()
                        .find(|(n, _)| n.contains(name) && n.ends_with("gate.weight"))
                        .unwrap();
                    f32::from_le_bytes(bytes[..4].try_into().unwrap())
                };
                // Without an index there is nothing to switch for who reads all that is there: it sees the new shard
                // as soon as it has its place.
                let early = kind == Kind::NoIndex && !second && gate("layers.0") == 7.0;
                assert!(early || gate("layers.0") == now[0], "{kind:?} {steps}");
                assert_eq!(gate("layers.0"), bf16(&read), "{kind:?} {steps}");
                whole(dir);
                seen.insert(now[0] as i32);
                if done {
                    ended.unwrap();
                    break;
                }
                let expected = if steps % 2 == 0 {
                    recover(dir).unwrap();
                    now[0]
                } else {
                    apply(dir, &routers(8.0, &[0, 1])).unwrap();
                    8.0
                };
                // A model in one file may have been between index and file: then it goes forward.
                let after = values(dir);
                assert!(after[0] == expected || after[0] == 7.0, "{kind:?} {steps}: {after:?}");
                whole(dir);
                assert!(!switch::is_unfinished(dir), "{kind:?} {steps}");
                assert!(!dir.join(".moe-merge/pending.json").exists());
                let left: BTreeSet<String> = weight_files(dir);
                let index = fs::read_to_string(dir.join(INDEX_NAME)).unwrap_or_default();
                assert!(
                    index.is_empty() || left.iter().all(|n| index.contains(n.as_str())),
                    "{kind:?} {steps}: {left:?}"
                );
                if after[0] == 1.0 && kind != Kind::Own {
                    assert!(!dir.join(".moe-merge").exists(), "{kind:?} {steps}");
                }
            }
            assert_eq!(seen.len(), 2, "both sides of the switch were seen: {seen:?}");
        }
    }
}

#[test]
fn what_cannot_be_changed_is_refused_and_leaves_nothing() {
    let dir = folder(Kind::Fused);
    let dir = dir.path();
    let before = hashes(dir);
    let change = |name: &str, shape: &[usize]| {
        let values = vec![1.0; shape.iter().product()];
        let weight = Arc::new(OwnedWeight::from_f32("new", &values, shape, Dtype::F32));
        let tensors = vec![(name.to_owned(), weight as WeightRef)];
        let tensors = vec![NewTensors { role: "expert-00".into(), tensors }];
        Change { action: "swap", tensors, ..Change::default() }
    };
    let refused = |change: &Change<'_>| {
        let error = apply(dir, change).unwrap_err();
        assert_eq!(hashes(dir), before, "{error:?}");
        error
    };
    let error = refused(&change("model.norm.weights", &[4]));
    assert!(
        matches!(&error, CheckpointError::MissingTensor { nearest: Some(n), .. } if n == SHARED)
    );
    assert!(matches!(refused(&change(SHARED, &[5])), CheckpointError::Shape { .. }));
    let part = "model.layers.0.block_sparse_moe.experts.0.w2.weight";
    assert!(matches!(refused(&change(part, &[4, 3])), CheckpointError::Shape { .. }));
    let gone = Change { remove: vec![part.into()], ..Change::default() };
    let error = refused(&gone);
    assert!(error.to_string().contains("a part of a fused tensor cannot go alone"), "{error}");
    let mut twice = routers(7.0, &[0]);
    twice.tensors.push(twice.tensors[0].clone());
    assert!(refused(&twice).to_string().contains("replaced twice"));
    let mut nan = routers(f32::NAN, &[0]);
    assert!(matches!(refused(&nan), CheckpointError::NotFinite { .. }));
    nan.parent = Some(3);
    assert!(matches!(refused(&nan), CheckpointError::Outdated { expected: 3, found: 0, .. }));
    let interrupt = Interrupt::default();
    interrupt.trigger();
    let error = commit(dir, &routers(7.0, &[0]), watch(&interrupt)).unwrap_err();
    assert!(matches!(error, CheckpointError::Interrupted));
    assert_eq!(hashes(dir), before);
}

#[test]
fn links_the_hub_cache_and_two_models_are_left_alone() {
    let dir = folder(Kind::Numbered);
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    let moved = dir.path().join("blob");
    fs::rename(&shard, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, &shard).unwrap();
    let error = apply(dir.path(), &routers(7.0, &[0])).unwrap_err();
    assert!(error.to_string().contains("whose files are links"), "{error}");
    let cache = dir.path().join("models--a--b/snapshots/main");
    fs::create_dir_all(&cache).unwrap();
    model(&cache, Kind::Single);
    let error = apply(&cache, &routers(7.0, &[0])).unwrap_err();
    assert!(error.to_string().contains("Hub cache"), "{error}");
    let both = folder(Kind::Numbered);
    let single = both.path().join("model.safetensors");
    fs::copy(both.path().join("model-00001-of-00002.safetensors"), single).unwrap();
    let error = apply(both.path(), &routers(7.0, &[0])).unwrap_err();
    assert!(error.to_string().contains("an index that names other files"), "{error}");
    let file = dir.path().join("m.gguf");
    fs::write(&file, "GGUF").unwrap();
    assert!(matches!(apply(&file, &routers(7.0, &[0])), Err(CheckpointError::Unsupported { .. })));
}

#[test]
fn two_writers_at_once_both_count() {
    let dir = folder(Kind::Own);
    std::thread::scope(|scope| {
        for i in 0..4 {
            let dir = dir.path();
            scope.spawn(move || apply(dir, &routers(2.0 + i as f32, &[0, 1])).unwrap());
        }
    });
    whole(dir.path());
    let lines = history(dir.path()).unwrap();
    assert_eq!(lines.iter().map(|l| l.generation).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!(weight_files(dir.path()).len(), 4);
}

#[test]
fn a_reader_follows_a_change() {
    for kind in [Kind::Own, Kind::Single, Kind::Numbered] {
        let dir = folder(kind);
        let dir = dir.path();
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                for i in 0..40 {
                    apply(dir, &routers(2.0 + i as f32, &[0, 1])).unwrap();
                }
            });
            let mut last = 1.0;
            while !writer.is_finished() {
                let now = values(dir);
                assert_eq!(now[0], now[1], "{kind:?}: two generations in one");
                assert!(now[0] >= last && now[2] == 5.0, "{kind:?} {now:?}");
                last = now[0];
            }
        });
        assert_eq!(values(dir)[0], 41.0);
        whole(dir);
    }
}

#[test]
fn tampering_is_found() {
    let interrupt = Interrupt::default();
    let make = || {
        let dir = folder(Kind::Own);
        apply(dir.path(), &routers(7.0, &[0, 1])).unwrap();
        apply(dir.path(), &routers(8.0, &[0, 1])).unwrap();
        dir
    };
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let dir = make();
    let shard = weight_files(dir.path()).into_iter().find(|n| n.contains("router")).unwrap();
    flip(&dir.path().join(&shard));
    let manifest = Manifest::load(dir.path()).unwrap().unwrap();
    let found = manifest.check(dir.path(), &interrupt).unwrap();
    assert!(matches!(&found[..], [Problem::Hash { file, .. }] if *file == shard), "{found:?}");

    let problems = |dir: &Path| check(dir, &interrupt).unwrap().problems;
    for (name, from, to) in [
        (JOURNAL_NAME, "\"calibrate\"", "\"swap\""),
        (MANIFEST_NAME, "logistic", "uniform"),
        (".moe-merge/manifests/0.json", "hidden", "HIDDEN"),
        (".moe-merge/manifests/1.json", "logistic", "uniform"),
    ] {
        let dir = make();
        let path = dir.path().join(name);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let found = problems(dir.path());
        assert!(matches!(&found[..], [Problem::History { .. }]), "{name}: {found:?}");
        if name.ends_with(".json") {
            assert!(found[0].to_string().contains(name), "{}", found[0]);
        }
        assert!(apply(dir.path(), &routers(9.0, &[0])).is_err(), "{name}");
        assert_eq!(values(dir.path())[0], 8.0);
    }
    let dir = make();
    let stored = history(dir.path()).unwrap()[1].removed.clone();
    let stored = stored.iter().find(|f| f.name != INDEX_NAME).unwrap();
    let path = switch::blob(dir.path(), &stored.blake3);
    flip(&path);
    let found = problems(dir.path());
    assert!(matches!(&found[..], [Problem::Hash { file, .. }] if file.contains(&stored.blake3)));
    fs::remove_file(path).unwrap();
    let kept = dir.path().join(".moe-merge/manifests/1.index.json");
    flip(&kept);
    let found = problems(dir.path());
    assert!(matches!(&found[..], [Problem::Hash { file, .. }] if file.ends_with("1.index.json")));
    flip(&kept);
    let checked = check(dir.path(), &interrupt).unwrap();
    assert_eq!(checked.problems, []);
    assert!(checked.notes[0].contains(&stored.name), "{:?}", checked.notes);
    let index = dir.path().join(INDEX_NAME);
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text + " ").unwrap();
    let error = apply(dir.path(), &routers(9.0, &[0])).unwrap_err();
    assert!(error.to_string().contains("not as its last generation left it"), "{error}");
}

#[test]
fn the_same_values_again_are_a_generation_without_files() {
    let dir = folder(Kind::Own);
    apply(dir.path(), &routers(7.0, &[0, 1])).unwrap();
    let before = weight_files(dir.path());
    let again = apply(dir.path(), &routers(7.0, &[0, 1])).unwrap();
    assert_eq!((again.number, weight_files(dir.path())), (2, before));
    whole(dir.path());
}

#[test]
fn a_note_that_leads_out_of_the_folder_is_refused() {
    let dir = folder(Kind::Own);
    let outside = dir.path().join("../outside.safetensors");
    let note = json!({"generation": 1, "index": "", "place": ["../outside.safetensors"],
        "single": null, "store": [], "finish": []});
    fs::write(dir.path().join(".moe-merge/pending.json"), note.to_string()).unwrap();
    let error = recover(dir.path()).unwrap_err();
    assert!(error.to_string().contains("outside the folder"), "{error}");
    assert!(!outside.exists());
    assert!(Manifest::load(dir.path()).is_err());
}

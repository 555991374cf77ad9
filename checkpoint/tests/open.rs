//! Folders, files and Hub snapshots as they are found in the world.

mod folder;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Instant;

use folder::{config, open, shard};
use moe_merge_checkpoint::hub::Hub;
use moe_merge_checkpoint::{CheckpointError, Explain, Source, SourceRef};

#[test]
fn every_reference_folder_opens_with_the_bytes_of_the_safetensors_crate() {
    for set in ["golden/arch", "golden/arch_v4"] {
        let Some(root) = moe_merge_testkit::shared(set) else { return };
        let mut folders: Vec<_> = fs::read_dir(&root).unwrap().map(|e| e.unwrap().path()).collect();
        folders.retain(|f| f.join("config.json").exists());
        folders.sort();
        assert!(folders.len() >= 9, "{set}: {} folders", folders.len());
        for folder in folders {
            let name = folder.file_name().unwrap().to_str().unwrap();
            let source = open(name, &root).unwrap();
            assert!(source.notes.is_empty(), "{:?}", source.notes);
            let mut seen = 0;
            for file in &source.files {
                assert!(file.file_name().unwrap().to_str().unwrap().starts_with("model"));
                let bytes = fs::read(file).unwrap();
                for (tensor, view) in
                    safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors()
                {
                    // Fused expert tensors may be seen as slices; the rest is found as it is stored.
                    let Some(weight) = source.tensors.get(&tensor) else { continue };
                    assert_eq!(weight.shape(), view.shape(), "{name} {tensor}");
                    assert_eq!(weight.bytes().unwrap(), view.data(), "{name} {tensor}");
                    seen += 1;
                }
            }
            assert!(seen > 5, "{name}: {seen} tensors compared");
        }
    }
}

#[test]
fn a_safetensors_file_stands_for_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    config(dir.path());
    shard(&dir.path().join("model.safetensors"), &["a"]);
    assert!(open("model.safetensors", dir.path()).unwrap().tensors.contains_key("a"));
}

#[test]
fn what_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("models/prose")).unwrap();
    let hint = |text: &str| match open(text, dir.path()).expect_err("must be refused") {
        CheckpointError::NotFound { hint, .. } => hint,
        other => panic!("{other:?}"),
    };
    assert!(hint("models/prsoe").contains("did you mean"), "{}", hint("models/prsoe"));
    assert!(hint("models/prsoe").contains("models/prose`?"));
    assert!(hint("a/b/c").contains("exists, what follows does not"));
    assert!(hint("models/prose@main").contains("has no revisions"));
    symlink("nowhere", dir.path().join("link-to-something")).unwrap();
    fs::write(dir.path().join("notes.txt"), "x").unwrap();
    let error = open("notes.txt", dir.path()).expect_err("must be refused");
    assert_eq!(error.to_string(), "not a model");
}

#[test]
fn weights_in_other_dtypes_are_named_when_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    config(dir.path());
    let view = |dtype, data| safetensors::tensor::TensorView::new(dtype, vec![1], data).unwrap();
    let tensors = [
        ("w", view(safetensors::Dtype::F8_E4M3, &[0u8; 1][..])),
        ("d", view(safetensors::Dtype::F64, &[0u8; 8][..])),
        ("position_ids", view(safetensors::Dtype::I64, &[0u8; 8][..])),
        ("model.norm.weight", view(safetensors::Dtype::BF16, &[0u8; 2][..])),
    ];
    let path = dir.path().join("model.safetensors");
    fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let source = open(".", dir.path()).unwrap();
    let mut other: Vec<_> = source.other.iter().map(ToString::to_string).collect();
    other.sort();
    assert_eq!(other, ["d (F64 [1])", "position_ids (I64 [1])", "w (F8_E4M3 [1])"]);
    let error = source.weight("w").expect_err("must be refused");
    assert_eq!(error.to_string(), "weight has an unsupported dtype");
    assert!(error.hint().unwrap().contains("quantised"));
    assert!(error.fields().contains(&("found", "F8_E4M3 [1]".into())));
    match source.weight("model.nrom.weight").expect_err("must be refused") {
        CheckpointError::MissingTensor { nearest, .. } => {
            assert_eq!(nearest.as_deref(), Some("model.norm.weight"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn opening_does_not_read_weights() {
    // A sparse file of 90 GB: reading it would take minutes.
    let dir = tempfile::tempdir().unwrap();
    config(dir.path());
    let (rows, cols) = (45_000u64, 1_000_000u64);
    let size = rows * cols * 2;
    let header =
        format!(r#"{{"w":{{"dtype":"BF16","shape":[{rows},{cols}],"data_offsets":[0,{size}]}}}}"#);
    let path = dir.path().join("model.safetensors");
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    fs::write(&path, &bytes).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    if file.set_len(bytes.len() as u64 + size).is_err() {
        eprintln!("this file system has no sparse files of 90 GB");
        return;
    }
    let start = Instant::now();
    let source = open(".", dir.path()).unwrap();
    let took = start.elapsed();
    assert_eq!(source.weight("w").unwrap().shape(), [45_000, 1_000_000]);
    assert!(took.as_secs() < 5, "{took:?}");
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER: &str = "0123aaaaaaabcdef0123456789abcdef01234567";

/// A cache as the Python client makes it: blobs, and links to them from snapshots.
fn cache(files: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("models--org--name");
    fs::create_dir_all(repo.join("refs/refs/pr")).unwrap();
    fs::create_dir_all(repo.join("blobs")).unwrap();
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    fs::write(repo.join("refs/refs/pr/1"), OTHER).unwrap();
    for commit in [COMMIT, OTHER] {
        let snapshot = repo.join("snapshots").join(commit);
        fs::create_dir_all(&snapshot).unwrap();
        for name in files {
            let blob = repo.join("blobs").join(format!("{commit}-{name}"));
            match *name {
                "config.json" => fs::write(&blob, r#"{"model_type":"llama"}"#).unwrap(),
                _ => shard(&blob, &[if commit == COMMIT { "a" } else { "b" }]),
            }
            symlink(format!("../../blobs/{commit}-{name}"), snapshot.join(name)).unwrap();
        }
    }
    dir
}

fn from_cache(text: &str, base: &Path, cache: &Path) -> Result<Source, CheckpointError> {
    let hub = Hub { cache: Some(cache.to_owned()), online: false };
    Source::open_with(&SourceRef::parse(text, base).unwrap(), base, &hub)
}

#[test]
fn hub_revisions() {
    let (cache, base) =
        (cache(&["config.json", "model.safetensors"]), tempfile::tempdir().unwrap());
    for (text, tensor) in [
        ("org/name", "a"),
        ("org/name@main", "a"),
        ("org/name@0123456", "a"),
        (&format!("org/name@{OTHER}"), "b"),
        ("org/name@0123a", "b"),
        ("org/name@refs/pr/1", "b"),
    ] {
        let source = from_cache(text, base.path(), cache.path()).unwrap();
        assert!(source.tensors.contains_key(tensor), "{text}");
        assert_eq!(source.label, text);
    }
    let hint = |text: &str| match from_cache(text, base.path(), cache.path()).err() {
        Some(CheckpointError::NotFound { hint, .. }) => hint,
        other => panic!("{text}: {other:?}"),
    };
    assert!(hint("org/name@0123").contains("2 commits"), "{}", hint("org/name@0123"));
    assert!(hint("org/name@v9").contains("`main`"), "{}", hint("org/name@v9"));
    assert!(hint("org/name@../main").contains("revisions"));
    let both = hint("org/unknown");
    assert!(both.contains("looked for the path") && both.contains("Hub cache"), "{both}");
    assert!(both.contains("huggingface-cli download org/unknown"), "{both}");
}

#[test]
fn a_path_wins_over_the_hub() {
    let (cache, base) =
        (cache(&["config.json", "model.safetensors"]), tempfile::tempdir().unwrap());
    let folder = base.path().join("org/name");
    fs::create_dir_all(&folder).unwrap();
    config(&folder);
    shard(&folder.join("model.safetensors"), &["local"]);
    let source = from_cache("org/name", base.path(), cache.path()).unwrap();
    assert!(source.tensors.contains_key("local"));
}

#[test]
fn incomplete_snapshots_name_the_file() {
    let base = tempfile::tempdir().unwrap();
    let found = |cache: &Path| match from_cache("org/name", base.path(), cache).err() {
        Some(CheckpointError::Malformed { what, expected, hint, .. }) => {
            assert_eq!(what, "`org/name` is not complete in the Hub cache");
            assert!(hint.unwrap().contains("huggingface-cli download org/name"));
            expected
        }
        other => panic!("{other:?}"),
    };
    let no_weights = cache(&["config.json"]);
    assert_eq!(found(no_weights.path()), "the file model.safetensors");
    let no_config = cache(&["model.safetensors"]);
    assert_eq!(found(no_config.path()), "the file config.json");
    let no_blob = cache(&["config.json", "model.safetensors"]);
    let blobs = no_blob.path().join("models--org--name/blobs");
    fs::remove_file(blobs.join(format!("{COMMIT}-model.safetensors"))).unwrap();
    assert_eq!(found(no_blob.path()), "the file model.safetensors");
    let no_shard = cache(&["config.json", "1.safetensors"]);
    let index = r#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#;
    let snapshot = no_shard.path().join("models--org--name/snapshots").join(COMMIT);
    fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(found(no_shard.path()), "the file 2.safetensors");
}

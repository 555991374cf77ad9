//! Replays the fuzz corpora: whatever the bytes, an answer and no panic.

use std::fs;
use std::path::{Path, PathBuf};

use moe_merge_checkpoint::{CheckpointError, adapter, gguf, header, index};

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = moe_merge_testkit::repository("fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect();
    files.sort();
    assert!(files.len() >= 5, "{target}: {} files", files.len());
    files
}

/// Files named `ok-*` are read, the others refused.
fn replay<T, E: std::fmt::Display>(target: &str, parse: impl Fn(&[u8], &Path) -> Result<T, E>) {
    for (path, bytes) in corpus(target) {
        let good = path.file_name().unwrap().to_str().unwrap().starts_with("ok-");
        match parse(&bytes, &path) {
            Ok(_) => assert!(good, "{} was read", path.display()),
            Err(e) => assert!(!good, "{} was refused: {e}", path.display()),
        }
    }
}

#[test]
fn safetensors_header() {
    replay("safetensors_header", header::parse);
}

#[test]
fn safetensors_index() {
    replay("index", index::parse);
}

#[test]
fn gguf_headers() {
    replay("gguf", |bytes, path| gguf::parse(bytes, path).map(|header| header.tensors.len()));
}

/// Whatever else is wrong with a file whose header is right, opening it and reading its tensors ends well.
#[test]
fn gguf_files() {
    for (path, bytes) in corpus("gguf") {
        let Ok(header) = gguf::parse(&bytes, &path) else { continue };
        let tensors = header.tensors.iter().filter(|t| !t.kind.is_no_weight()).count();
        let raw = gguf::open_raw(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(raw.len(), tensors, "{}", path.display());
        let named = gguf::open(&path).map(|source| source.tensors).unwrap_or_default();
        for weight in raw.values().chain(named.values()) {
            assert_eq!(weight.to_f32().unwrap().len(), weight.len());
        }
    }
}

#[test]
fn adapter_configs() {
    let weights = moe_merge_testkit::repository(
        "checkpoint/tests/data/adapters/linear/adapter_model.safetensors",
    );
    replay("adapter_config", |bytes, _| -> Result<_, CheckpointError> {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(&weights, dir.path().join("adapter_model.safetensors")).unwrap();
        fs::write(dir.path().join("adapter_config.json"), bytes).unwrap();
        adapter::describe(dir.path())
    });
}

//! Replays the fuzz corpora: whatever the bytes, an answer and no panic.

use std::fs;
use std::path::{Path, PathBuf};

use moe_merge_checkpoint::{header, index};

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

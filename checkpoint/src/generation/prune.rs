//! Forgetting what generations of the past held.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::Serialize;

use super::journal::history;
use super::old::Old;
use super::switch::STORE;
use crate::error::CheckpointError;
use crate::manifest::Manifest;

/// What was forgotten.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Files that were removed from the store.
    pub files: usize,
    /// Bytes that this freed.
    pub bytes: u64,
    /// Generations that cannot come back now.
    pub generations: Vec<u32>,
}

/// Removes the shards that neither the live generation nor the `keep` before it need. The caller holds the lock.
pub(super) fn prune(folder: &Path, keep: usize) -> Result<Pruned, CheckpointError> {
    use std::os::unix::fs::MetadataExt;
    let lines = history(folder)?;
    let find = |g| Old::find(folder, &lines, g).ok();
    let mut needed = BTreeSet::new();
    for line in lines.iter().rev().take(keep.saturating_add(1)) {
        let files = find(line.generation).map(|old| old.manifest.files);
        needed.extend(files.into_iter().flatten().map(|f| f.blake3));
    }
    // What lies in the folder need not lie in the store too.
    let live = Manifest::load(folder)?.map(|m| m.files).unwrap_or_default();
    for file in live.iter().filter(|f| folder.join(&f.name).exists()) {
        needed.remove(&file.blake3);
    }
    let whole = || -> BTreeSet<u32> {
        lines.iter().map(|l| l.generation).filter(|g| find(*g).is_some()).collect()
    };
    let before = whole();
    let mut pruned = Pruned::default();
    let store = folder.join(STORE);
    for entry in fs::read_dir(&store).into_iter().flatten().flatten() {
        let path = entry.path();
        let hash = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if needed.contains(&hash) {
            continue;
        }
        // A file that the live generation has too frees nothing.
        let freed = entry.metadata().map_or(0, |m| if m.nlink() == 1 { m.len() } else { 0 });
        fs::remove_file(&path).map_err(|e| CheckpointError::io("removing a file", &path, e))?;
        pruned.files += 1;
        pruned.bytes += freed;
    }
    let _ = fs::remove_dir(&store);
    let after = whole();
    pruned.generations = before.difference(&after).copied().collect();
    Ok(pruned)
}

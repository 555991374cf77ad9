//! Safetensors shards, streamed from weights to disk.
//!
//! Every file is hashed while it is written. Memory stays at a few MB per thread whatever the size of a tensor, and the
//! bytes do not depend on the number of threads.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use moe_merge_kernels::Dtype;
use serde_json::{Map, Value, json};

use crate::error::CheckpointError;
use crate::manifest::FileRecord;
use crate::publish::{Interrupt, free_bytes};
use crate::resume::Log;
use crate::shard::OtherTensor;
use crate::weight::WeightRef;
use file::Run;

mod compute;
mod file;
mod flush;

/// Largest shard, in bytes of tensors: the usual default of the Hugging Face tools.
pub const SHARD_LIMIT: u64 = 5_000_000_000;

/// Name of the index of a model in several files.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// A tensor to write.
#[derive(Debug, Clone)]
pub struct OutTensor {
    /// Its name in the file.
    pub name: String,
    /// Where its numbers come from.
    pub weight: WeightRef,
    /// How they are stored; numbers are rounded once, to nearest even.
    pub dtype: Dtype,
}

impl OutTensor {
    /// Bytes it takes.
    pub fn size(&self) -> u64 {
        self.weight.size_in(self.dtype)
    }
}

/// How a file is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShardName {
    /// `STEM-HASH8.safetensors`, with the first eight digits of the BLAKE3 hash of the file: a new content never takes
    /// the name of an old one.
    ByContent(String),
    /// Exactly this.
    Fixed(String),
}

/// One file to write.
#[derive(Debug, Clone)]
pub struct ShardPlan {
    /// Its name.
    pub name: ShardName,
    /// What it holds, in any order: the file is sorted by size of number (largest first), then by name.
    pub tensors: Vec<OutTensor>,
    /// Tensors that are no weights, copied as they are; those whose bytes are not known are left out.
    pub buffers: Vec<OtherTensor>,
}

impl ShardPlan {
    /// A file of weights alone.
    pub fn new(name: ShardName, tensors: Vec<OutTensor>) -> Self {
        Self { name, tensors, buffers: Vec::new() }
    }
}

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenShard {
    /// Name, size, hash.
    pub file: FileRecord,
    /// Names of its tensors, sorted.
    pub tensors: Vec<String>,
    /// Bytes of its tensors, without the header.
    pub tensor_bytes: u64,
}

/// What a long piece of writing tells and asks.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Asked before every chunk.
    pub interrupt: &'a Interrupt,
    /// Told the number of bytes just written; called from several threads.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

/// Cuts tensors into runs of at most `limit` bytes, in the order given; a larger tensor is a run of its own.
pub fn split(tensors: Vec<OutTensor>, limit: u64) -> Vec<Vec<OutTensor>> {
    let mut parts: Vec<Vec<OutTensor>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let size = tensor.size();
        match parts.last_mut() {
            Some(part) if filled + size <= limit => part.push(tensor),
            _ => {
                parts.push(vec![tensor]);
                filled = 0;
            }
        }
        filled += size;
    }
    parts
}

/// Writes `shards` into `dir`, several at a time, and returns them in the order given.
///
/// # Errors
/// * [`CheckpointError::NotFinite`] naming the source of a NaN or infinity
/// * [`CheckpointError::Malformed`] if a number does not fit the output dtype
/// * [`CheckpointError::NoRoom`] when the disk fills up, [`CheckpointError::Io`] for other failures
/// * [`CheckpointError::Interrupted`]
/// * whatever computing a weight meets
pub fn write_shards(
    dir: &Path,
    shards: &[ShardPlan],
    watch: Watch<'_>,
) -> Result<Vec<WrittenShard>, CheckpointError> {
    write_logged(dir, shards, None, watch)
}

/// As [`write_shards`]; notes in `log` what is written, and goes on from what an earlier run noted there.
///
/// # Errors
/// As [`write_shards`].
pub fn write_logged(
    dir: &Path,
    shards: &[ShardPlan],
    log: Option<&Log>,
    watch: Watch<'_>,
) -> Result<Vec<WrittenShard>, CheckpointError> {
    let results: Vec<Mutex<Option<WrittenShard>>> =
        shards.iter().map(|_| Mutex::default()).collect();
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let error: Mutex<Option<CheckpointError>> = Mutex::default();
    let large = Mutex::new(());
    // These threads wait for the pool, which does all computing: the number of busy threads is the pool's. One more than
    // that writes while another waits for the disk.
    let writers = (rayon::current_num_threads() + 1).min(8).min(shards.len());
    std::thread::scope(|scope| {
        let run = Run { dir, log, watch, stop: &failed, large: &large, scope };
        let (results, next, failed, error) = (&results, &next, &failed, &error);
        let work = move || {
            while let Some((i, shard)) = Some(next.fetch_add(1, Ordering::Relaxed))
                .and_then(|i| shards.get(i).map(|s| (i, s)))
            {
                match run.shard(i, shard) {
                    Ok(written) => *lock(&results[i]) = Some(written),
                    Err(e) => {
                        // The first to fail tells why; the others then stop on its behalf.
                        if !failed.swap(true, Ordering::SeqCst) {
                            *lock(error) = Some(e);
                        }
                        return;
                    }
                }
            }
        };
        for _ in 0..writers {
            scope.spawn(work);
        }
    });
    if let Some(e) = lock(&error).take() {
        return Err(with_numbers(e, dir, shards));
    }
    Ok(results.into_iter().filter_map(|r| r.into_inner().ok().flatten()).collect())
}

/// A lock whose holder cannot panic half way.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A full disk, with what would have been needed and what there is.
fn with_numbers(error: CheckpointError, dir: &Path, shards: &[ShardPlan]) -> CheckpointError {
    match error {
        CheckpointError::NoRoom { path, needed: 0, .. } => CheckpointError::NoRoom {
            path,
            needed: shards.iter().flat_map(|s| &s.tensors).map(OutTensor::size).sum(),
            free: free_bytes(dir).unwrap_or(0),
        },
        other => other,
    }
}

/// Writes the index of `shards`: sorted names, sizes of tensors summed.
///
/// # Errors
/// [`CheckpointError::Io`], [`CheckpointError::NoRoom`].
pub fn write_index(dir: &Path, shards: &[WrittenShard]) -> Result<FileRecord, CheckpointError> {
    let total: u64 = shards.iter().map(|s| s.tensor_bytes).sum();
    let mut names: Vec<(&String, &String)> =
        shards.iter().flat_map(|s| s.tensors.iter().map(move |t| (t, &s.file.name))).collect();
    names.sort();
    let map: Map<String, Value> =
        names.into_iter().map(|(t, f)| (t.clone(), Value::String(f.clone()))).collect();
    write_json(dir, INDEX_NAME, &json!({ "metadata": { "total_size": total }, "weight_map": map }))
}

/// Writes a small JSON file, indented, with a line end.
///
/// # Errors
/// [`CheckpointError::Io`], [`CheckpointError::NoRoom`].
pub fn write_json(dir: &Path, name: &str, value: &Value) -> Result<FileRecord, CheckpointError> {
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    write_file(dir, name, text.as_bytes())
}

/// Writes a small file; folders in its name are created.
///
/// # Errors
/// [`CheckpointError::Io`], [`CheckpointError::NoRoom`].
pub fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<FileRecord, CheckpointError> {
    let path = dir.join(name);
    let parent = path.parent().unwrap_or(dir);
    fs::create_dir_all(parent).map_err(|e| CheckpointError::io("creating a folder", parent, e))?;
    fs::write(&path, bytes).map_err(|e| CheckpointError::io("writing", &path, e))?;
    Ok(FileRecord {
        name: name.to_owned(),
        size: bytes.len() as u64,
        blake3: blake3::hash(bytes).to_hex().to_string(),
    })
}

/// Bytes handled at a time: large enough for the cost of a system call and of waking a thread not to matter, small
/// enough to stay in the second-level cache between the check, the hash and the copy.
const CHUNK: usize = 1 << 20;

#[cfg(test)]
mod tests;

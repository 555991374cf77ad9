//! Safetensors shards, streamed from weights to disk.
//!
//! Every file is hashed while it is written. Memory stays at a few MB per thread whatever the size of a tensor, and the
//! bytes do not depend on the number of threads.

use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use moe_merge_kernels::{Dtype, cast};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::error::CheckpointError;
use crate::manifest::FileRecord;
use crate::publish::{Interrupt, free_bytes};
use crate::weight::WeightRef;
use flush::Flusher;

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
    let results: Vec<Mutex<Option<WrittenShard>>> =
        shards.iter().map(|_| Mutex::default()).collect();
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let error: Mutex<Option<CheckpointError>> = Mutex::default();
    let large = Mutex::new(());
    let work = || {
        while let Some((i, shard)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| shards.get(i).map(|s| (i, s)))
        {
            match ShardWriter::write(dir, i, shard, watch, &failed, &large) {
                Ok(written) => *lock(&results[i]) = Some(written),
                Err(e) => {
                    // The first to fail tells why; the others then stop on its behalf.
                    if !failed.swap(true, Ordering::SeqCst) {
                        *lock(&error) = Some(e);
                    }
                    return;
                }
            }
        }
    };
    // These threads wait for the pool, which does all computing: the number of busy threads is the pool's. One more than
    // that writes while another waits for the disk.
    let writers = (rayon::current_num_threads() + 1).min(shards.len());
    std::thread::scope(|scope| {
        for _ in 0..writers {
            scope.spawn(work);
        }
    });
    if let Some(e) = lock(&error).take() {
        return Err(with_numbers(e, dir, shards));
    }
    Ok(results.into_iter().filter_map(|r| r.into_inner().ok().flatten()).collect())
}

/// Rows as bytes, in order: a few blocks at a time, each block on a thread of its own.
///
/// * `[rows, cols]` of the tensor, `width` bytes of a row
/// * `fill` writes some rows; `put` takes what several blocks gave
pub(crate) fn by_blocks(
    [rows, cols]: [usize; 2],
    width: usize,
    scratch: &mut Vec<u8>,
    fill: impl Fn(Range<usize>, &mut [u8]) -> Result<(), CheckpointError> + Sync,
    mut put: impl FnMut(&[u8]) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    if rows * cols == 0 {
        return Ok(());
    }
    let block_rows = (CHUNK / 4 / cols).clamp(1, rows);
    let batch_rows = block_rows * rayon::current_num_threads().clamp(1, 16);
    scratch.resize(scratch.len().max(batch_rows.min(rows) * width), 0);
    for from in (0..rows).step_by(batch_rows) {
        let to = rows.min(from + batch_rows);
        let out = &mut scratch[..(to - from) * width];
        let done: Vec<Result<(), CheckpointError>> = out
            .par_chunks_mut(block_rows * width)
            .enumerate()
            .map(|(i, out)| {
                let start = from + i * block_rows;
                fill(start..start + out.len() / width, out)
            })
            .collect();
        done.into_iter().collect::<Result<(), _>>()?;
        put(out)?;
    }
    Ok(())
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

/// Bytes of a tensor above which only one is computed at a time: all threads have work in it.
const LARGE: u64 = 64 << 20;

struct ShardWriter<'a> {
    file: File,
    flusher: Flusher,
    path: PathBuf,
    hasher: blake3::Hasher,
    size: u64,
    watch: Watch<'a>,
    stop: &'a AtomicBool,
    /// Output bytes of a few blocks of computed rows.
    scratch: Vec<u8>,
}

impl<'a> ShardWriter<'a> {
    fn write(
        dir: &Path,
        number: usize,
        shard: &ShardPlan,
        watch: Watch<'a>,
        stop: &'a AtomicBool,
        large: &Mutex<()>,
    ) -> Result<WrittenShard, CheckpointError> {
        let path = match &shard.name {
            ShardName::Fixed(name) => dir.join(name),
            ShardName::ByContent(_) => dir.join(format!(".shard-{number}.partial")),
        };
        let file =
            File::create_new(&path).map_err(|e| CheckpointError::io("creating", &path, e))?;
        let mut writer = Self {
            file,
            flusher: Flusher::default(),
            path,
            hasher: blake3::Hasher::new(),
            size: 0,
            watch,
            stop,
            scratch: Vec::new(),
        };
        let mut tensors: Vec<&OutTensor> = shard.tensors.iter().collect();
        tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then(a.name.cmp(&b.name)));
        writer.put(&header(&tensors))?;
        for tensor in &tensors {
            match (tensor.weight.bytes(), tensor.weight.dtype() == tensor.dtype) {
                (Some(bytes), true) => {
                    writer.stored(tensor, bytes)?;
                    tensor.weight.release();
                }
                _ => {
                    // What it is made of may be many times its size, and is in memory until it is released.
                    let _alone = (tensor.size() > LARGE).then(|| lock(large));
                    writer.computed(tensor)?;
                    tensor.weight.release();
                }
            }
        }
        writer.finish(dir, shard, &tensors)
    }

    /// Bytes that are in a file as they have to be.
    fn stored(&mut self, tensor: &OutTensor, bytes: &[u8]) -> Result<(), CheckpointError> {
        for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
            self.put_with(chunk, || match cast::first_non_finite(chunk, tensor.dtype) {
                Some(at) => Err(not_finite(tensor, i * CHUNK / tensor.dtype.size() + at)),
                None => Ok(()),
            })?;
        }
        Ok(())
    }

    /// Numbers that have to be computed or rounded.
    fn computed(&mut self, tensor: &OutTensor) -> Result<(), CheckpointError> {
        tensor.weight.prepare()?;
        let sizes = [tensor.weight.rows(), tensor.weight.cols()];
        let width = tensor.weight.cols() * tensor.dtype.size();
        let mut scratch = std::mem::take(&mut self.scratch);
        let fill = |rows: Range<usize>, out: &mut [u8]| narrow_rows(tensor, rows, out);
        let done = by_blocks(sizes, width, &mut scratch, fill, |out| {
            out.chunks(CHUNK).try_for_each(|chunk| self.put(chunk))
        });
        self.scratch = scratch;
        done
    }

    fn put(&mut self, chunk: &[u8]) -> Result<(), CheckpointError> {
        self.put_with(chunk, || Ok(()))
    }

    /// Checks and hashes on one thread while another one hands the bytes to the system.
    fn put_with(
        &mut self,
        chunk: &[u8],
        check: impl FnOnce() -> Result<(), CheckpointError> + Send,
    ) -> Result<(), CheckpointError> {
        self.watch.interrupt.check()?;
        if self.stop.load(Ordering::Relaxed) {
            return Err(CheckpointError::Interrupted);
        }
        let (hasher, file) = (&mut self.hasher, &mut self.file);
        let (checked, written) = rayon::join(
            || {
                check()?;
                hasher.update(chunk);
                Ok(())
            },
            || file.write_all(chunk),
        );
        written
            .and_then(|()| self.flusher.wrote(&self.file, chunk.len()))
            .map_err(|e| CheckpointError::io("writing", &self.path, e))?;
        checked?;
        self.size += chunk.len() as u64;
        (self.watch.progress)(chunk.len() as u64);
        Ok(())
    }

    fn finish(
        self,
        dir: &Path,
        shard: &ShardPlan,
        tensors: &[&OutTensor],
    ) -> Result<WrittenShard, CheckpointError> {
        // Publishing needs the bytes on the disk: here the wait overlaps with the writing of other shards.
        self.flusher
            .finish(&self.file)
            .map_err(|e| CheckpointError::io("writing", &self.path, e))?;
        let blake3 = self.hasher.finalize().to_hex().to_string();
        let name = match &shard.name {
            ShardName::Fixed(name) => name.clone(),
            ShardName::ByContent(stem) => {
                let name = format!("{stem}-{}.safetensors", &blake3[..8]);
                let to = dir.join(&name);
                fs::rename(&self.path, &to)
                    .map_err(|e| CheckpointError::io("naming a shard", &to, e))?;
                name
            }
        };
        let mut names: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
        names.sort();
        Ok(WrittenShard {
            file: FileRecord { name, size: self.size, blake3 },
            tensors: names,
            tensor_bytes: tensors.iter().map(|t| t.size()).sum(),
        })
    }
}

/// What the first tensor begins at a multiple of: a cache line. Rows that lie across two are read more slowly.
const ALIGNMENT: usize = 64;

/// Length, names, shapes and offsets, padded so that the first tensor begins at a multiple of [`ALIGNMENT`].
fn header(tensors: &[&OutTensor]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.size();
        let dtype = match tensor.dtype {
            Dtype::F32 => "F32",
            Dtype::BF16 => "BF16",
            Dtype::F16 => "F16",
        };
        map.insert(
            tensor.name.clone(),
            json!({ "dtype": dtype, "shape": tensor.weight.shape(), "data_offsets": [offset, end] }),
        );
        offset = end;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    let length = size_of::<u64>();
    json.resize((length + json.len()).next_multiple_of(ALIGNMENT) - length, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

/// Numbers that are computed before they are rounded: few enough to be still in the second-level cache then.
const NARROWED: usize = 1 << 16;

/// Computes `rows` and rounds them into `out`.
fn narrow_rows(
    tensor: &OutTensor,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    let cols = tensor.weight.cols();
    let step = (NARROWED / cols).max(1);
    let mut values = vec![0.0; rows.len().min(step) * cols];
    let parts = out.chunks_mut(step * cols * tensor.dtype.size());
    for (from, out) in rows.clone().step_by(step).zip(parts) {
        let to = rows.end.min(from + step);
        let values = &mut values[..(to - from) * cols];
        tensor.weight.read_rows(from..to, values)?;
        narrow(tensor, from * cols, values, out)?;
    }
    Ok(())
}

/// Rounds `values`, which begin at the flat index `first`, into `out`.
fn narrow(
    tensor: &OutTensor,
    first: usize,
    values: &[f32],
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    cast::narrow(values, tensor.dtype, out);
    let Some(at) = cast::first_non_finite(out, tensor.dtype) else { return Ok(()) };
    if !values[at].is_finite() {
        return Err(not_finite(tensor, first + at));
    }
    let (file, name) = tensor.weight.origin();
    Err(CheckpointError::Malformed {
        what: format!("a number is too large for {}", tensor.dtype.config_name()),
        file,
        tensor: Some(name),
        expected: match tensor.dtype {
            Dtype::F16 => "at most 65504 in magnitude".into(),
            _ => "at most 3.38e38 in magnitude".into(),
        },
        found: format!("{} at flat index {}", values[at], first + at),
        hint: Some("write `dtype: bfloat16` or `float32`".into()),
    })
}

fn not_finite(tensor: &OutTensor, index: usize) -> CheckpointError {
    let (file, name) = tensor.weight.origin();
    CheckpointError::NotFinite { file, tensor: name, index }
}

#[cfg(test)]
mod tests;

//! Safetensors shards, streamed from weights to disk.
//!
//! Every file is hashed while it is written. Memory stays at a few MB per thread whatever the size of a tensor, and the
//! bytes do not depend on the number of threads.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};

use moe_merge_kernels::{Dtype, cast};
use serde_json::{Map, Value, json};

use crate::error::CheckpointError;
use crate::manifest::FileRecord;
use crate::publish::{Interrupt, free_bytes};
use crate::resume::{Log, Point};
use crate::weight::WeightRef;

mod compute;
mod sync;

pub(crate) use compute::by_blocks;
use compute::{narrow_rows, not_finite};
use sync::{Part, STEP, Syncer};

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
    write_logged(dir, shards, None, watch)
}

/// As [`write_shards`]; notes in `log` what has reached the disk, and goes on from what an earlier run noted there.
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
    let syncer = Syncer::new(log);
    let work = |parts: Sender<Part>| {
        while let Some((i, shard)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| shards.get(i).map(|s| (i, s)))
        {
            let place = Place { dir, number: i, syncer: &syncer, parts: &parts };
            match ShardWriter::write(place, shard, watch, &failed) {
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
        let (sender, parts) = channel();
        scope.spawn(|| syncer.run(parts));
        for _ in 0..writers {
            let sender = sender.clone();
            scope.spawn(|| work(sender));
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

/// Where a shard is written.
#[derive(Clone, Copy)]
struct Place<'a> {
    dir: &'a Path,
    /// Number of the shard.
    number: usize,
    syncer: &'a Syncer<'a>,
    parts: &'a Sender<Part>,
}

impl Place<'_> {
    /// The name it has while it grows.
    fn growing(&self) -> String {
        format!(".shard-{}.partial", self.number)
    }
}

struct ShardWriter<'a> {
    place: Place<'a>,
    file: File,
    path: PathBuf,
    hasher: blake3::Hasher,
    size: u64,
    /// Bytes that were sent to the disk.
    sent: u64,
    watch: Watch<'a>,
    stop: &'a AtomicBool,
    /// Output bytes of a few blocks of computed rows.
    scratch: Vec<u8>,
}

impl<'a> ShardWriter<'a> {
    fn write(
        place: Place<'a>,
        shard: &ShardPlan,
        watch: Watch<'a>,
        stop: &'a AtomicBool,
    ) -> Result<WrittenShard, CheckpointError> {
        let mut tensors: Vec<&OutTensor> = shard.tensors.iter().collect();
        tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then(a.name.cmp(&b.name)));
        let header = header(&tensors);
        let mut writer = match Self::take_up(place, &header, watch, stop)? {
            Some(writer) => writer,
            None => Self::create(place, watch, stop)?,
        };
        // What an earlier run had written ends where a tensor does.
        let mut end = header.len() as u64;
        let there = |t: &&&OutTensor| {
            end += t.size();
            end <= writer.size
        };
        let done = tensors.iter().take_while(there).count();
        if writer.size == 0 {
            writer.put(&header)?;
        }
        for run in compute::runs(&tensors[done..]) {
            match run {
                [tensor] => match compute::stored(tensor) {
                    Some(bytes) => writer.stored(tensor, bytes)?,
                    None => writer.computed(tensor)?,
                },
                several => writer.together(several)?,
            }
            run.iter().for_each(|t| t.weight.release());
            writer.send()?;
        }
        writer.finish(shard, &tensors)
    }

    fn create(
        place: Place<'a>,
        watch: Watch<'a>,
        stop: &'a AtomicBool,
    ) -> Result<Self, CheckpointError> {
        let path = place.dir.join(place.growing());
        let file =
            File::create_new(&path).map_err(|e| CheckpointError::io("creating", &path, e))?;
        let (hasher, scratch) = (blake3::Hasher::new(), Vec::new());
        Ok(Self { place, file, path, hasher, size: 0, sent: 0, watch, stop, scratch })
    }

    /// Goes on with the file that an earlier run has left, if it is what that run noted.
    fn take_up(
        place: Place<'a>,
        header: &[u8],
        watch: Watch<'a>,
        stop: &'a AtomicBool,
    ) -> Result<Option<Self>, CheckpointError> {
        let Some(point) = place.syncer.earlier(place.number) else { return Ok(None) };
        let before = place.dir.join(&point.file);
        let path = place.dir.join(place.growing());
        let failed = |e| CheckpointError::io("reading what an earlier run had written", &before, e);
        let Ok(mut file) = File::options().read(true).write(true).open(&before) else {
            return Ok(None);
        };
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; CHUNK];
        let (mut size, mut same) = (0, true);
        while size < point.bytes {
            watch.interrupt.check()?;
            let wanted = (point.bytes - size).min(CHUNK as u64) as usize;
            let read = file.read(&mut buffer[..wanted]).map_err(failed)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            let from = (size as usize).min(header.len());
            let expected = &header[from..(from + read).min(header.len())];
            same &= buffer.starts_with(expected);
            size += read as u64;
        }
        if !same || size != point.bytes || hasher.finalize().to_hex().as_str() != point.blake3 {
            fs::remove_file(&before).map_err(failed)?;
            return Ok(None);
        }
        file.set_len(size).map_err(failed)?;
        fs::rename(&before, &path).map_err(failed)?;
        (watch.progress)(size);
        let scratch = Vec::new();
        Ok(Some(Self { place, file, path, hasher, size, sent: size, watch, stop, scratch }))
    }

    /// Sends what is new to the disk, if it is much.
    fn send(&mut self) -> Result<(), CheckpointError> {
        if self.size - self.sent < STEP {
            return Ok(());
        }
        self.place.syncer.check(self.place.number)?;
        let file =
            self.file.try_clone().map_err(|e| CheckpointError::io("writing", &self.path, e))?;
        let point = self.point(self.place.growing());
        // Nobody takes it only when all shards are written.
        let _ = self.place.parts.send(Part { file, path: self.path.clone(), point });
        self.sent = self.size;
        Ok(())
    }

    fn point(&self, file: String) -> Point {
        let blake3 = self.hasher.finalize().to_hex().to_string();
        Point { shard: self.place.number, file, bytes: self.size, blake3 }
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

    /// The same for several small tensors.
    fn together(&mut self, tensors: &[&OutTensor]) -> Result<(), CheckpointError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let bytes = compute::together(tensors, &mut scratch)?;
        bytes.chunks(CHUNK).try_for_each(|chunk| self.put(chunk))?;
        self.scratch = scratch;
        Ok(())
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
        written.map_err(|e| CheckpointError::io("writing", &self.path, e))?;
        checked?;
        self.size += chunk.len() as u64;
        (self.watch.progress)(chunk.len() as u64);
        Ok(())
    }

    fn finish(
        self,
        shard: &ShardPlan,
        tensors: &[&OutTensor],
    ) -> Result<WrittenShard, CheckpointError> {
        // Publishing needs the bytes on the disk: here the wait overlaps with the writing of other shards.
        self.file.sync_data().map_err(|e| CheckpointError::io("writing", &self.path, e))?;
        self.place.syncer.check(self.place.number)?;
        let mut point = self.point(String::new());
        point.file = match &shard.name {
            ShardName::Fixed(name) => name.clone(),
            ShardName::ByContent(stem) => format!("{stem}-{}.safetensors", &point.blake3[..8]),
        };
        let to = self.place.dir.join(&point.file);
        fs::rename(&self.path, &to).map_err(|e| CheckpointError::io("naming a shard", &to, e))?;
        self.place.syncer.note(&point);
        let mut names: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
        names.sort();
        Ok(WrittenShard {
            file: FileRecord { name: point.file, size: point.bytes, blake3: point.blake3 },
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

#[cfg(test)]
mod tests;

//! One shard: its header, then its tensors, hashed and handed to the system while the next ones are computed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::Scope;

use moe_merge_kernels::{Dtype, cast};
use serde_json::{Map, Value, json};

use super::compute::{Piece, fill, not_finite, pieces, prepare};
use super::flush::Flusher;
use super::{CHUNK, OutTensor, ShardName, ShardPlan, Watch, WrittenShard, lock};
use crate::error::CheckpointError;
use crate::manifest::FileRecord;
use crate::resume::{Log, Point};
use crate::shard::OtherTensor;

/// Bytes of a tensor above which only one is computed at a time: all threads have work in it.
const LARGE: u64 = 64 << 20;

/// What all shards of an output share while they are written.
#[derive(Clone, Copy)]
pub(super) struct Run<'a, 'env> {
    pub dir: &'a Path,
    /// What is written, now or by an earlier run.
    pub log: Option<&'a Log>,
    pub watch: Watch<'a>,
    /// Raised when another shard has failed.
    pub stop: &'a AtomicBool,
    /// Held while a large tensor is computed.
    pub large: &'a Mutex<()>,
    /// For the threads that write.
    pub scope: &'a Scope<'a, 'env>,
}

impl<'a> Run<'a, '_> {
    /// Writes shard `number`.
    pub fn shard(
        self,
        number: usize,
        shard: &'a ShardPlan,
    ) -> Result<WrittenShard, CheckpointError> {
        let mut tensors: Vec<&OutTensor> = shard.tensors.iter().collect();
        tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then(a.name.cmp(&b.name)));
        let [before, behind] = around(&shard.buffers);
        let header = header(&before, &tensors, &behind);
        let mut writer = match ShardWriter::take_up(self, number, &header)? {
            Some(writer) => writer,
            None => ShardWriter::create(self, number)?,
        };
        if writer.size == 0 {
            writer.put(&header)?;
            before.iter().try_for_each(|b| writer.copy(b.0))?;
        }
        // What an earlier run had written ends where a tensor does.
        let first = header.len() as u64 + before.iter().map(|b| b.0.len() as u64).sum::<u64>();
        let (mut end, there) = (first, writer.size);
        let missing = tensors.iter().filter(|t| {
            end += t.size();
            end > there
        });
        let missing: Vec<&OutTensor> = missing.copied().collect();
        let (steps, taken) = sync_channel(0);
        let (used, buffers) = channel();
        let writing = self.scope.spawn(move || {
            taken.into_iter().try_for_each(|step| writer.step(step, &used))?;
            if writer.size == end {
                behind.iter().try_for_each(|b| writer.copy(b.0))?;
            }
            Ok(writer)
        });
        let computed = self.compute(pieces(&missing), steps, buffers);
        let writer = writing.join().map_err(|_| {
            let panicked = std::io::Error::other("the thread that writes a file panicked");
            CheckpointError::io("writing", self.dir, panicked)
        })??;
        computed?;
        writer.finish(shard, &tensors)
    }

    /// Computes all `pieces` into one of two buffers while the other one is written. Ends early if nobody takes them.
    fn compute(
        self,
        pieces: Vec<Piece<'a>>,
        steps: SyncSender<Step<'a>>,
        buffers: Receiver<Vec<u8>>,
    ) -> Result<(), CheckpointError> {
        let mut spare = vec![Vec::new(), Vec::new()];
        let mut alone = None;
        for piece in pieces {
            let step = match piece {
                Piece::Stored(tensor, bytes) => {
                    alone = None;
                    Step::Stored(tensor, bytes)
                }
                Piece::Computed(parts) => {
                    // What it is made of may be many times its size, and is in memory until it is released.
                    match parts.iter().any(|p| p.tensor.size() > LARGE) {
                        true if alone.is_none() => alone = Some(lock(self.large)),
                        true => {}
                        false => alone = None,
                    }
                    let buffer = spare.pop().or_else(|| buffers.recv().ok());
                    let Some(mut buffer) = buffer else { return Ok(()) };
                    prepare(&parts)?;
                    let size = fill(&parts, &mut buffer)?;
                    let done = || parts.iter().filter(|p| p.last());
                    done().for_each(|p| p.tensor.weight.release());
                    Step::Computed { buffer, size, whole: done().next().is_some() }
                }
            };
            if steps.send(step).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// What is to be written next.
enum Step<'a> {
    Stored(&'a OutTensor, &'a [u8]),
    Computed {
        buffer: Vec<u8>,
        /// Bytes of it.
        size: usize,
        /// Whether a tensor ends with it.
        whole: bool,
    },
}

/// The name of shard `number` while it grows.
fn growing(number: usize) -> String {
    format!(".shard-{number}.partial")
}

struct ShardWriter<'a, 'env> {
    run: Run<'a, 'env>,
    number: usize,
    file: File,
    flusher: Flusher<'a>,
    path: PathBuf,
    hasher: blake3::Hasher,
    size: u64,
}

impl<'a, 'env> ShardWriter<'a, 'env> {
    fn create(run: Run<'a, 'env>, number: usize) -> Result<Self, CheckpointError> {
        let path = run.dir.join(growing(number));
        let file =
            File::create_new(&path).map_err(|e| CheckpointError::io("creating", &path, e))?;
        Ok(Self::with(run, number, file, path))
    }

    fn with(run: Run<'a, 'env>, number: usize, file: File, path: PathBuf) -> Self {
        let (flusher, hasher) = (Flusher::new(run.log), blake3::Hasher::new());
        Self { run, number, file, flusher, path, hasher, size: 0 }
    }

    /// Goes on with the file that an earlier run has left, if it is what that run noted and begins with `header`; else
    /// removes it.
    fn take_up(
        run: Run<'a, 'env>,
        number: usize,
        header: &[u8],
    ) -> Result<Option<Self>, CheckpointError> {
        let Some(point) = run.log.and_then(|log| log.point(number)) else { return Ok(None) };
        let before = run.dir.join(&point.file);
        let failed = |e| CheckpointError::io("reading what an earlier run had written", &before, e);
        let Ok(file) = File::options().read(true).write(true).open(&before) else {
            return Ok(None);
        };
        let mut writer = Self::with(run, number, file, run.dir.join(growing(number)));
        let mut buffer = vec![0; CHUNK];
        let mut same = true;
        while writer.size < point.bytes {
            run.watch.interrupt.check()?;
            let wanted = (point.bytes - writer.size).min(CHUNK as u64) as usize;
            let read = writer.file.read(&mut buffer[..wanted]).map_err(failed)?;
            if read == 0 {
                break;
            }
            writer.hasher.update(&buffer[..read]);
            let from = (writer.size as usize).min(header.len());
            let expected = &header[from..(from + read).min(header.len())];
            same &= buffer.starts_with(expected);
            writer.size += read as u64;
        }
        if !same || writer.point() != (Point { file: growing(number), ..point.clone() }) {
            fs::remove_file(&before).map_err(failed)?;
            return Ok(None);
        }
        writer.file.set_len(writer.size).map_err(failed)?;
        fs::rename(&before, &writer.path).map_err(failed)?;
        (run.watch.progress)(writer.size);
        Ok(Some(writer))
    }

    /// What is written so far.
    fn point(&self) -> Point {
        Point {
            shard: self.number,
            file: growing(self.number),
            bytes: self.size,
            blake3: self.hasher.finalize().to_hex().to_string(),
        }
    }

    /// Writes, and gives back the buffer that was written.
    fn step(&mut self, step: Step<'_>, used: &Sender<Vec<u8>>) -> Result<(), CheckpointError> {
        let whole = match step {
            Step::Stored(tensor, bytes) => {
                self.stored(tensor, bytes)?;
                tensor.weight.release();
                true
            }
            Step::Computed { buffer, size, whole } => {
                buffer[..size].chunks(CHUNK).try_for_each(|chunk| self.put(chunk))?;
                // Nobody takes it when all is computed.
                let _ = used.send(buffer);
                whole
            }
        };
        if whole && self.run.log.is_some() {
            self.flusher.whole(self.point());
        }
        Ok(())
    }

    /// Bytes that are no weights.
    fn copy(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        bytes.chunks(CHUNK).try_for_each(|chunk| self.put(chunk))
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

    fn put(&mut self, chunk: &[u8]) -> Result<(), CheckpointError> {
        self.put_with(chunk, || Ok(()))
    }

    /// Checks and hashes on one thread while another one hands the bytes to the system.
    fn put_with(
        &mut self,
        chunk: &[u8],
        check: impl FnOnce() -> Result<(), CheckpointError> + Send,
    ) -> Result<(), CheckpointError> {
        self.run.watch.interrupt.check()?;
        if self.run.stop.load(Ordering::Relaxed) {
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
        self.flusher.wrote(&self.file, self.size);
        (self.run.watch.progress)(chunk.len() as u64);
        Ok(())
    }

    fn finish(
        self,
        shard: &ShardPlan,
        tensors: &[&OutTensor],
    ) -> Result<WrittenShard, CheckpointError> {
        let mut point = self.point();
        // Publishing needs the bytes on the disk: here the wait overlaps with the writing of other shards.
        self.file.sync_data().map_err(|e| CheckpointError::io("writing", &self.path, e))?;
        point.file = match &shard.name {
            ShardName::Fixed(name) => name.clone(),
            ShardName::ByContent(stem) => format!("{stem}-{}.safetensors", &point.blake3[..8]),
        };
        let to = self.run.dir.join(&point.file);
        fs::rename(&self.path, &to).map_err(|e| CheckpointError::io("naming a shard", &to, e))?;
        if let Some(log) = self.run.log {
            log.note(&point);
        }
        let buffers: Vec<_> = around(&shard.buffers).into_iter().flatten().collect();
        let mut names: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
        names.extend(buffers.iter().map(|(_, b)| b.name.clone()));
        names.sort();
        let copied: u64 = buffers.iter().map(|(bytes, _)| bytes.len() as u64).sum();
        Ok(WrittenShard {
            file: FileRecord { name: point.file, size: point.bytes, blake3: point.blake3 },
            tensors: names,
            tensor_bytes: tensors.iter().map(|t| t.size()).sum::<u64>() + copied,
        })
    }
}

/// A tensor that is no weight, and its bytes.
type Buffer<'a> = (&'a [u8], &'a OtherTensor);

/// Buffers that stand before the weights, and those behind: so each number begins at a multiple of its size.
fn around(buffers: &[OtherTensor]) -> [Vec<Buffer<'_>>; 2] {
    let width = |(bytes, b): &Buffer<'_>| bytes.len() / b.shape.iter().product::<usize>().max(1);
    let mut all: Vec<Buffer<'_>> =
        buffers.iter().filter_map(|b| b.bytes().map(|bytes| (bytes, b))).collect();
    all.sort_by(|a, b| width(b).cmp(&width(a)).then(a.1.name.cmp(&b.1.name)));
    let behind = all.split_off(all.partition_point(|b| width(b) >= 4));
    [all, behind]
}

/// What the first tensor begins at a multiple of: a cache line. Rows that lie across two are read more slowly.
const ALIGNMENT: usize = 64;

/// Length, names, shapes and offsets, padded so that the first tensor begins at a multiple of [`ALIGNMENT`].
fn header(before: &[Buffer<'_>], tensors: &[&OutTensor], behind: &[Buffer<'_>]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "pt" }));
    let buffer = |(bytes, b): &Buffer<'_>| {
        (b.name.clone(), json!(b.dtype), json!(b.shape), bytes.len() as u64)
    };
    let weight = |t: &&OutTensor| {
        (t.name.clone(), json!(stored(t.dtype)), json!(t.weight.shape()), t.size())
    };
    let weights = tensors.iter().map(weight);
    let mut offset = 0;
    for (name, dtype, shape, size) in
        before.iter().map(buffer).chain(weights).chain(behind.iter().map(buffer))
    {
        let entry =
            json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size] });
        map.insert(name, entry);
        offset += size;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    let length = size_of::<u64>();
    json.resize((length + json.len()).next_multiple_of(ALIGNMENT) - length, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

/// A dtype as the file spells it.
fn stored(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::BF16 => "BF16",
        Dtype::F16 => "F16",
    }
}

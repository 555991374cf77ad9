//! One shard: its header, then its tensors, hashed while they are written.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;

use moe_merge_kernels::{Dtype, cast};
use serde_json::{Map, Value, json};

use super::compute::{by_blocks, narrow_rows, not_finite};
use super::flush::Flusher;
use super::{CHUNK, OutTensor, ShardName, ShardPlan, Watch, WrittenShard, lock};
use crate::error::CheckpointError;
use crate::manifest::FileRecord;
use crate::resume::{Log, Point};

/// Bytes of a tensor above which only one is computed at a time: all threads have work in it.
const LARGE: u64 = 64 << 20;

/// What all shards of an output share while they are written.
#[derive(Clone, Copy)]
pub(super) struct Run<'a, 'env> {
    pub dir: &'a Path,
    /// What has reached the disk, now or in an earlier run.
    pub log: Option<&'a Log>,
    pub watch: Watch<'a>,
    /// Raised when another shard has failed.
    pub stop: &'a AtomicBool,
    /// Held while a large tensor is computed.
    pub large: &'a Mutex<()>,
    /// For the threads that wait for the disk.
    pub scope: &'a Scope<'a, 'env>,
}

impl Run<'_, '_> {
    /// Writes shard `number`.
    pub fn shard(self, number: usize, shard: &ShardPlan) -> Result<WrittenShard, CheckpointError> {
        let mut tensors: Vec<&OutTensor> = shard.tensors.iter().collect();
        tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then(a.name.cmp(&b.name)));
        let header = header(&tensors);
        let mut writer = match ShardWriter::take_up(self, number, &header)? {
            Some(writer) => writer,
            None => ShardWriter::create(self, number)?,
        };
        if writer.size == 0 {
            writer.put(&header)?;
        }
        // What an earlier run had written ends where a tensor does.
        let (mut end, there) = (header.len() as u64, writer.size);
        for tensor in &tensors {
            end += tensor.size();
            if end <= there {
                continue;
            }
            match (tensor.weight.bytes(), tensor.weight.dtype() == tensor.dtype) {
                (Some(bytes), true) => {
                    writer.stored(tensor, bytes)?;
                    tensor.weight.release();
                }
                _ => {
                    // What it is made of may be many times its size, and is in memory until it is released.
                    let _alone = (tensor.size() > LARGE).then(|| lock(self.large));
                    writer.computed(tensor)?;
                    tensor.weight.release();
                }
            }
            if self.log.is_some() {
                writer.flusher.whole(writer.point());
            }
        }
        writer.finish(shard, &tensors)
    }
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
    /// Output bytes of a few blocks of computed rows.
    scratch: Vec<u8>,
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
        Self { run, number, file, flusher, path, hasher, size: 0, scratch: Vec::new() }
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
        written
            .and_then(|()| self.flusher.wrote(&self.file, chunk.len(), self.run.scope))
            .map_err(|e| CheckpointError::io("writing", &self.path, e))?;
        checked?;
        self.size += chunk.len() as u64;
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
        self.flusher
            .finish(&self.file)
            .map_err(|e| CheckpointError::io("writing", &self.path, e))?;
        point.file = match &shard.name {
            ShardName::Fixed(name) => name.clone(),
            ShardName::ByContent(stem) => format!("{stem}-{}.safetensors", &point.blake3[..8]),
        };
        let to = self.run.dir.join(&point.file);
        fs::rename(&self.path, &to).map_err(|e| CheckpointError::io("naming a shard", &to, e))?;
        if let Some(log) = self.run.log {
            log.note(&point);
        }
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

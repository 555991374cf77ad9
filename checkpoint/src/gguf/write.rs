//! GGUF files, streamed from weights to disk.
//!
//! # Source
//! ggml `docs/gguf.md`, version 3, little-endian.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use moe_merge_kernels::{Dtype, cast};
use rayon::prelude::*;

use crate::error::CheckpointError;
use crate::gguf::kinds::TensorKind;
use crate::gguf::quantise;
use crate::gguf::target::Target;
use crate::publish::Replace;
use crate::weight::WeightRef;
use crate::write::Watch;

/// A metadata value to write.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum MetaValue {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
}

/// Metadata in the order in which it is written.
pub type Metadata = Vec<(String, MetaValue)>;

/// How the numbers of a tensor are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Storage {
    F32,
    F16,
    BF16,
    /// Blocks of 32 signed bytes with a scale.
    Q8_0,
}

impl Storage {
    /// The storage that keeps numbers of `dtype` as they are.
    pub fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::BF16 => Self::BF16,
        }
    }

    /// The ggml type.
    pub fn kind(self) -> TensorKind {
        match self {
            Self::F32 => TensorKind::F32,
            Self::F16 => TensorKind::F16,
            Self::BF16 => TensorKind::BF16,
            Self::Q8_0 => TensorKind::Q8_0,
        }
    }

    /// `general.file_type` of a file whose matrices are stored like this.
    ///
    /// # Source
    /// `llama.h`, `enum llama_ftype`.
    pub fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::BF16 => 32,
        }
    }

    /// The dtype, where numbers are stored one by one.
    fn dtype(self) -> Option<Dtype> {
        match self {
            Self::F32 => Some(Dtype::F32),
            Self::F16 => Some(Dtype::F16),
            Self::BF16 => Some(Dtype::BF16),
            Self::Q8_0 => None,
        }
    }

    /// Bytes of `values` numbers, which are whole blocks.
    fn bytes(self, values: usize) -> usize {
        let (block, size) = self.kind().block();
        values / block * size
    }
}

/// A tensor to write.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    /// Its name in the file.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// How it is stored; rows of [`Storage::Q8_0`] are whole blocks.
    pub storage: Storage,
    /// Where its numbers come from, one weight after the other.
    pub parts: Vec<WeightRef>,
}

impl GgufTensor {
    /// Bytes it takes, without what fills up to the next tensor.
    pub fn size(&self) -> u64 {
        self.storage.bytes(self.shape.iter().product()) as u64
    }
}

/// What is written where.
#[derive(Debug, Clone)]
pub struct GgufPlan {
    /// The metadata.
    pub metadata: Metadata,
    /// The tensors, in the order of the file.
    pub tensors: Vec<GgufTensor>,
}

/// Tensors begin at multiples of this many bytes, the default of the format.
const ALIGNMENT: u64 = 32;

/// Bytes handled at a time by one thread.
const CHUNK: usize = 1 << 20;

impl GgufPlan {
    /// Bytes of all tensors: what [`Watch::progress`] is told in the end.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(GgufTensor::size).sum()
    }

    /// Writes the file `path`, tensor by tensor. It appears complete or not at all, and its bytes do not depend on the number
    /// of threads. `sources` are files that must not be replaced. Returns the size of the file.
    ///
    /// # Errors
    /// * [`CheckpointError::OutputExists`], [`CheckpointError::NotAGguf`] for a target that is there
    /// * [`CheckpointError::NoRoom`] before the first byte if the disk has no room, or when it fills up
    /// * [`CheckpointError::NotFinite`] naming the source of a NaN or infinity, [`CheckpointError::Malformed`] if a number
    ///   does not fit the storage
    /// * [`CheckpointError::Interrupted`], [`CheckpointError::Io`], whatever computing a weight meets
    pub fn write(
        &self,
        path: &Path,
        replace: Replace,
        sources: &[PathBuf],
        watch: Watch<'_>,
    ) -> Result<u64, CheckpointError> {
        let target = Target::new(path, replace)?;
        target.protect(sources)?;
        let header = self.header();
        let total = header.len() as u64
            + self.tensors.iter().map(|t| t.size().next_multiple_of(ALIGNMENT)).sum::<u64>();
        target.need(total)?;
        let written = Writer {
            out: BufWriter::with_capacity(CHUNK, target.file()),
            path: target.path(),
            watch,
            scratch: Vec::new(),
        }
        .all(&header, &self.tensors);
        written.map_err(|e| match e {
            CheckpointError::NoRoom { path, needed: 0, .. } => {
                CheckpointError::NoRoom { path, needed: total, free: 0 }
            }
            other => other,
        })?;
        target.publish()?;
        Ok(total)
    }

    /// Everything before the first tensor, filled up to where it begins.
    fn header(&self) -> Vec<u8> {
        debug_assert_eq!(
            self.tensors.iter().map(|t| &t.name).collect::<BTreeSet<_>>().len(),
            self.tensors.len(),
            "names are unique"
        );
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            for axis in tensor.shape.iter().rev() {
                out.extend((*axis as u64).to_le_bytes());
            }
            out.extend(tensor.storage.kind().id().to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += tensor.size().next_multiple_of(ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        out
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &MetaValue) {
    let mut list = |kind: u32, len: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        MetaValue::U32(v) => {
            out.extend(4u32.to_le_bytes());
            out.extend(v.to_le_bytes());
        }
        MetaValue::F32(v) => {
            out.extend(6u32.to_le_bytes());
            out.extend(v.to_le_bytes());
        }
        MetaValue::Bool(v) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*v));
        }
        MetaValue::Text(v) => {
            out.extend(8u32.to_le_bytes());
            put_text(out, v);
        }
        MetaValue::I32s(v) => {
            list(5, v.len());
            v.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        MetaValue::F32s(v) => {
            list(6, v.len());
            v.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        MetaValue::Bools(v) => {
            list(7, v.len());
            out.extend(v.iter().map(|v| u8::from(*v)));
        }
        MetaValue::Texts(v) => {
            list(8, v.len());
            v.iter().for_each(|v| put_text(out, v));
        }
    }
}

struct Writer<'a> {
    out: BufWriter<&'a File>,
    path: &'a Path,
    watch: Watch<'a>,
    /// Output bytes of a few blocks of rows.
    scratch: Vec<u8>,
}

impl Writer<'_> {
    fn all(mut self, header: &[u8], tensors: &[GgufTensor]) -> Result<(), CheckpointError> {
        self.put(header)?;
        for tensor in tensors {
            for part in &tensor.parts {
                self.part(part, tensor.storage)?;
                part.release();
            }
            let fill = tensor.size().next_multiple_of(ALIGNMENT) - tensor.size();
            self.put(&[0; ALIGNMENT as usize][..fill as usize])?;
        }
        self.out.flush().map_err(|e| CheckpointError::io("writing", self.path, e))
    }

    fn part(&mut self, weight: &WeightRef, storage: Storage) -> Result<(), CheckpointError> {
        match weight.bytes() {
            Some(bytes) if storage.dtype() == Some(weight.dtype()) => {
                let dtype = weight.dtype();
                for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
                    if let Some(at) = cast::first_non_finite(chunk, dtype) {
                        return Err(not_finite(weight, i * CHUNK / dtype.size() + at));
                    }
                    self.put(chunk)?;
                    (self.watch.progress)(chunk.len() as u64);
                }
                Ok(())
            }
            _ => self.computed(weight, storage),
        }
    }

    /// Numbers that have to be computed or rounded.
    fn computed(&mut self, weight: &WeightRef, storage: Storage) -> Result<(), CheckpointError> {
        let sizes = [weight.rows(), weight.cols()];
        let mut scratch = std::mem::take(&mut self.scratch);
        let fill = |rows: Range<usize>, out: &mut [u8]| store_rows(weight, rows, storage, out);
        let done = by_blocks(sizes, storage.bytes(weight.cols()), &mut scratch, fill, |out| {
            self.put(out)?;
            (self.watch.progress)(out.len() as u64);
            Ok(())
        });
        self.scratch = scratch;
        done
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.watch.interrupt.check()?;
        self.out.write_all(bytes).map_err(|e| CheckpointError::io("writing", self.path, e))
    }
}

/// Rows as bytes, in order: a few blocks at a time, each block on a thread of its own.
///
/// * `[rows, cols]` of the tensor, `width` bytes of a row
/// * `fill` writes some rows; `put` takes what several blocks gave
fn by_blocks(
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

/// Computes `rows` and rounds them into `out`.
fn store_rows(
    weight: &WeightRef,
    rows: Range<usize>,
    storage: Storage,
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    let cols = weight.cols();
    let first = rows.start * cols;
    let mut values = vec![0.0; rows.len() * cols];
    weight.read_rows(rows, &mut values)?;
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Err(not_finite(weight, first + at));
    }
    let too_large = match storage.dtype() {
        Some(dtype) => {
            cast::narrow(&values, dtype, out);
            cast::first_non_finite(out, dtype)
        }
        None => quantise::q8_0(&values, out).map(|block| block * quantise::BLOCK),
    };
    let Some(at) = too_large else { return Ok(()) };
    let (file, name) = weight.origin();
    Err(CheckpointError::Malformed {
        what: format!("a number is too large for {}", storage.kind()),
        file,
        tensor: Some(name),
        expected: match storage {
            Storage::F16 => "at most 65504 in magnitude".into(),
            Storage::Q8_0 => "at most 8.3e6 in magnitude".into(),
            Storage::F32 | Storage::BF16 => "at most 3.38e38 in magnitude".into(),
        },
        found: format!("{} at flat index {}", values[at], first + at),
        hint: Some("write it in bf16 or f32".into()),
    })
}

fn not_finite(weight: &WeightRef, index: usize) -> CheckpointError {
    let (file, name) = weight.origin();
    CheckpointError::NotFinite { file, tensor: name, index }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::gguf::header;
    use crate::gguf::value::Value;
    use crate::publish::Interrupt;
    use crate::weight::OwnedWeight;

    fn weight(values: &[f32], shape: &[usize], dtype: Dtype) -> WeightRef {
        Arc::new(OwnedWeight::from_f32("w", values, shape, dtype))
    }

    fn plan() -> GgufPlan {
        let values: Vec<f32> = (0..64).map(|i| i as f32 / 4.0).collect();
        let parts =
            vec![weight(&values, &[2, 32], Dtype::BF16), weight(&values, &[2, 32], Dtype::F32)];
        let tensor = |name: &str, shape: &[usize], storage, parts: &[WeightRef]| GgufTensor {
            name: name.into(),
            shape: shape.to_vec(),
            storage,
            parts: parts.to_vec(),
        };
        GgufPlan {
            metadata: vec![
                ("a".into(), MetaValue::U32(7)),
                ("b".into(), MetaValue::Texts(vec!["x".into(), "yz".into()])),
                ("c".into(), MetaValue::Bool(true)),
                ("d".into(), MetaValue::Bools(vec![true, false])),
                ("e".into(), MetaValue::F32s(vec![1.5])),
                ("f".into(), MetaValue::I32s(vec![-1])),
                ("g".into(), MetaValue::Text("t".into())),
                ("h".into(), MetaValue::F32(0.5)),
            ],
            tensors: vec![
                tensor("v", &[3], Storage::F32, &[weight(&[1.0, 2.0, 3.0], &[3], Dtype::BF16)]),
                tensor("m", &[2, 2, 32], Storage::BF16, &parts),
                tensor("q", &[2, 2, 32], Storage::Q8_0, &parts),
            ],
        }
    }

    fn write(plan: &GgufPlan, path: &Path) -> Result<u64, CheckpointError> {
        let interrupt = Interrupt::default();
        let watch = Watch { interrupt: &interrupt, progress: &|_| {} };
        plan.write(path, Replace::Never, &[], watch)
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let size = write(&plan(), &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, size);
        let header = header::parse(&bytes, &path).unwrap();
        assert_eq!(header.get("a"), Some(&Value::Unsigned(7)));
        assert_eq!(header.get("c"), Some(&Value::Bool(true)));
        assert_eq!(header.get("g"), Some(&Value::Text("t")));
        assert_eq!(header.get("h"), Some(&Value::F32(0.5)));
        let numbers = |key: &str| match header.get(key) {
            Some(Value::List(list)) => list.numbers().unwrap().collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            (numbers("d"), numbers("e"), numbers("f")),
            (vec![1.0, 0.0], vec![1.5], vec![-1.0])
        );
        let shapes: Vec<_> = header.tensors.iter().map(|t| (t.name, t.shape.clone())).collect();
        assert_eq!(shapes, [("v", vec![3]), ("m", vec![2, 2, 32]), ("q", vec![2, 2, 32])]);
        let raw = crate::gguf::open_raw(&path).unwrap();
        let values: Vec<f32> = (0..64).map(|i| i as f32 / 4.0).collect();
        assert_eq!(raw["v"].to_f32().unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(raw["m"].to_f32().unwrap(), [values.clone(), values].concat());
    }

    #[test]
    fn bad_numbers_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for (value, storage) in [
            (f32::NAN, Storage::F32),
            (f32::INFINITY, Storage::Q8_0),
            (1e6, Storage::F16),
            (1e9, Storage::Q8_0),
        ] {
            let mut values = [0.0; 32];
            values[5] = value;
            let mut plan = plan();
            plan.tensors[1].storage = storage;
            plan.tensors[1].parts = vec![weight(&values, &[1, 32], Dtype::F32); 4];
            let error = write(&plan, &dir.path().join("m.gguf")).unwrap_err();
            match (value.is_finite(), &error) {
                (false, CheckpointError::NotFinite { index: 5, .. }) => {}
                (true, CheckpointError::Malformed { what, .. }) => {
                    assert!(what.contains("too large"), "{what}");
                }
                _ => panic!("{error:?}"),
            }
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn an_interrupt_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let interrupt = Interrupt::default();
        let stop = |_| interrupt.trigger();
        let watch = Watch { interrupt: &interrupt, progress: &stop };
        let error =
            plan().write(&dir.path().join("m.gguf"), Replace::Never, &[], watch).unwrap_err();
        assert!(matches!(error, CheckpointError::Interrupted), "{error:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn bytes_do_not_depend_on_threads() {
        let dir = tempfile::tempdir().unwrap();
        let values: Vec<f32> = (0..700 * 96).map(|i| (i as f32 * 0.37).sin()).collect();
        let plan = GgufPlan {
            metadata: Vec::new(),
            tensors: vec![GgufTensor {
                name: "m".into(),
                shape: vec![700, 96],
                storage: Storage::Q8_0,
                parts: vec![weight(&values, &[700, 96], Dtype::F32)],
            }],
        };
        let bytes = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let path = dir.path().join(threads.to_string());
            pool.install(|| write(&plan, &path)).unwrap();
            std::fs::read(path).unwrap()
        };
        assert_eq!(bytes(1), bytes(3));
    }
}

//! Numbers that have to be computed or rounded before they are written, on all threads of the pool.

use std::cell::Cell;
use std::ops::Range;

use moe_merge_kernels::{Dtype, cast};
use rayon::prelude::*;

use super::{CHUNK, OutTensor};
use crate::error::CheckpointError;

/// Rows of a tensor that are computed at a time.
#[derive(Debug, Clone)]
pub(super) struct Part<'t> {
    pub tensor: &'t OutTensor,
    rows: Range<usize>,
}

impl Part<'_> {
    /// Whether the tensor begins here.
    pub fn first(&self) -> bool {
        self.rows.start == 0
    }

    /// Whether the tensor ends here.
    pub fn last(&self) -> bool {
        self.rows.end == self.tensor.weight.rows()
    }

    fn size(&self) -> usize {
        self.rows.len() * self.tensor.weight.cols() * self.tensor.dtype.size()
    }
}

/// What is written at a time.
#[derive(Debug)]
pub(super) enum Piece<'t> {
    /// A tensor that lies in a file as it has to be.
    Stored(&'t OutTensor, &'t [u8]),
    /// Some rows of one tensor, or several whole ones: work for all threads.
    Computed(Vec<Part<'t>>),
}

/// Cuts tensors into pieces.
pub(super) fn pieces<'t>(tensors: &[&'t OutTensor]) -> Vec<Piece<'t>> {
    let room = CHUNK / 4 * rayon::current_num_threads().clamp(1, 16);
    let (mut pieces, mut filled) = (Vec::new(), 0);
    for &tensor in tensors {
        let bytes = tensor.weight.bytes().filter(|_| tensor.weight.dtype() == tensor.dtype);
        if let Some(bytes) = bytes {
            pieces.push(Piece::Stored(tensor, bytes));
            continue;
        }
        let [rows, cols] = [tensor.weight.rows(), tensor.weight.cols()];
        let whole = Part { tensor, rows: 0..rows };
        match pieces.last_mut() {
            Some(Piece::Computed(parts)) if filled + rows * cols <= room => parts.push(whole),
            _ if rows * cols <= room => {
                pieces.push(Piece::Computed(vec![whole]));
                filled = 0;
            }
            _ => {
                let step = (room / cols).max(1);
                let cut = (0..rows).step_by(step).map(|from| from..rows.min(from + step));
                pieces.extend(cut.map(|rows| Piece::Computed(vec![Part { tensor, rows }])));
                filled = room;
            }
        }
        filled += rows * cols;
    }
    pieces
}

/// Finds out what has to be known about each tensor that begins in `parts`: about one by all threads, about several by one
/// thread each.
pub(super) fn prepare(parts: &[Part<'_>]) -> Result<(), CheckpointError> {
    let tensors: Vec<&OutTensor> = parts.iter().filter(|p| p.first()).map(|p| p.tensor).collect();
    match tensors.as_slice() {
        [one] => one.weight.prepare(),
        many => in_order(many.par_iter().map(|t| t.weight.prepare())),
    }
}

/// Waits for all; of several that failed, the first.
fn in_order(
    work: impl IndexedParallelIterator<Item = Result<(), CheckpointError>>,
) -> Result<(), CheckpointError> {
    let mut done = Vec::new();
    work.collect_into_vec(&mut done);
    done.into_iter().collect()
}

/// Computes `parts`, whose tensors are prepared, one after the other into `out`, which grows where it is too short; returns
/// how many bytes there are.
pub(super) fn fill(parts: &[Part<'_>], out: &mut Vec<u8>) -> Result<usize, CheckpointError> {
    let total = parts.iter().map(Part::size).sum();
    out.resize(out.len().max(total), 0);
    let mut blocks = Vec::new();
    let mut rest = &mut out[..total];
    for part in parts {
        let (bytes, after) = rest.split_at_mut(part.size());
        rest = after;
        let cols = part.tensor.weight.cols();
        if !bytes.is_empty() {
            let height = (CHUNK / 4 / cols).clamp(1, part.rows.len());
            let cut = bytes.chunks_mut(height * cols * part.tensor.dtype.size());
            blocks.extend(part.rows.clone().step_by(height).zip(cut).map(|b| (part.tensor, b)));
        }
    }
    in_order(blocks.into_par_iter().map(|(tensor, (from, out))| {
        let rows = out.len() / (tensor.weight.cols() * tensor.dtype.size());
        narrow_rows(tensor, from..from + rows, out)
    }))?;
    Ok(total)
}

/// Numbers that are computed before they are rounded: few enough to be still in the first-level cache then.
const NARROWED: usize = 1 << 12;

/// Computes `rows` and rounds them into `out`.
fn narrow_rows(
    tensor: &OutTensor,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    let cols = tensor.weight.cols();
    let step = (NARROWED / cols).max(1);
    let mut values = VALUES.take();
    values.resize(values.len().max(rows.len().min(step) * cols), 0.0);
    let parts = out.chunks_mut(step * cols * tensor.dtype.size());
    let done = rows.clone().step_by(step).zip(parts).try_for_each(|(from, out)| {
        let to = rows.end.min(from + step);
        let values = &mut values[..(to - from) * cols];
        tensor.weight.read_rows(from..to, values)?;
        narrow(tensor, from * cols, values, out)
    });
    VALUES.set(values);
    done
}

thread_local! {
    /// What [`narrow_rows`] computed last on this thread, to be used again. Computing may run other work of the pool, which
    /// then finds none.
    static VALUES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
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

pub(super) fn not_finite(tensor: &OutTensor, index: usize) -> CheckpointError {
    let (file, name) = tensor.weight.origin();
    CheckpointError::NotFinite { file, tensor: name, index }
}

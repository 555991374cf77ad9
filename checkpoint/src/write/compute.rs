//! Numbers that have to be computed or rounded before they are written, on all threads of the pool.

use std::ops::Range;

use moe_merge_kernels::{Dtype, cast};
use rayon::prelude::*;

use super::{CHUNK, OutTensor};
use crate::error::CheckpointError;

/// Bytes of the tensors that are computed together, at most: enough small ones for all threads to have work.
const TOGETHER: u64 = 8 << 20;

/// Cuts tensors into runs: one that lies in a file as it has to be, one that is large, or several small ones that are
/// computed together.
pub(super) fn runs<'a, 't>(tensors: &'a [&'t OutTensor]) -> Vec<&'a [&'t OutTensor]> {
    let small = |t: &OutTensor| {
        stored(t).is_none() && t.size() <= TOGETHER / 4 && t.weight.prepares_alone()
    };
    let (mut runs, mut rest) = (Vec::new(), tensors);
    while let Some(first) = rest.first() {
        let mut filled = first.size();
        let fits = |t: &&&OutTensor| {
            filled += t.size();
            small(t) && filled <= TOGETHER
        };
        let more = if small(first) { rest[1..].iter().take_while(fits).count() } else { 0 };
        let (run, after) = rest.split_at(1 + more);
        runs.push(run);
        rest = after;
    }
    runs
}

/// The bytes of a tensor, if they exist as they have to be written.
pub(super) fn stored(tensor: &OutTensor) -> Option<&[u8]> {
    tensor.weight.bytes().filter(|_| tensor.weight.dtype() == tensor.dtype)
}

/// Computes all of several tensors into `scratch`, one after the other.
pub(super) fn together<'s>(
    tensors: &[&OutTensor],
    scratch: &'s mut Vec<u8>,
) -> Result<&'s [u8], CheckpointError> {
    let results: Vec<_> = tensors.par_iter().map(|t| t.weight.prepare()).collect();
    results.into_iter().collect::<Result<(), _>>()?;
    let total = tensors.iter().map(|t| t.size() as usize).sum();
    scratch.resize(scratch.len().max(total), 0);
    let mut blocks = Vec::new(); // tensor, its first row, bytes
    let mut rest = &mut scratch[..total];
    for tensor in tensors {
        let (bytes, after) = rest.split_at_mut(tensor.size() as usize);
        rest = after;
        let [rows, cols] = [tensor.weight.rows(), tensor.weight.cols()];
        if rows * cols > 0 {
            let height = block_rows(rows, cols);
            let cut = bytes.chunks_mut(height * cols * tensor.dtype.size()).enumerate();
            blocks.extend(cut.map(|(i, bytes)| (tensor, i * height, bytes)));
        }
    }
    let results: Vec<_> = blocks
        .into_par_iter()
        .map(|(tensor, first, out)| {
            let rows = out.len() / (tensor.weight.cols() * tensor.dtype.size());
            narrow_rows(tensor, first..first + rows, out)
        })
        .collect();
    results.into_iter().collect::<Result<(), _>>()?;
    Ok(&scratch[..total])
}

/// Rows that one thread computes at a time.
fn block_rows(rows: usize, cols: usize) -> usize {
    (CHUNK / 4 / cols).clamp(1, rows)
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
    let block_rows = block_rows(rows, cols);
    let batch_rows = block_rows * rayon::current_num_threads().clamp(1, 4);
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
pub(super) fn narrow_rows(
    tensor: &OutTensor,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    let cols = tensor.weight.cols();
    let first = rows.start * cols;
    let mut values = vec![0.0; rows.len() * cols];
    tensor.weight.read_rows(rows, &mut values)?;
    cast::narrow(&values, tensor.dtype, out);
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

//! Numbers that have to be computed or rounded before they are written, on all threads of the pool.

use std::ops::Range;

use moe_merge_kernels::{Dtype, cast};
use rayon::prelude::*;

use super::{CHUNK, OutTensor};
use crate::error::CheckpointError;

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

/// Numbers that are computed before they are rounded: few enough to be still in the second-level cache then.
const NARROWED: usize = 1 << 16;

/// Computes `rows` and rounds them into `out`.
pub(super) fn narrow_rows(
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

pub(super) fn not_finite(tensor: &OutTensor, index: usize) -> CheckpointError {
    let (file, name) = tensor.weight.origin();
    CheckpointError::NotFinite { file, tensor: name, index }
}

//! Weights on a device, as stored.

use crate::cast::{self, Dtype};
use crate::cuda::backend::Arg;
use crate::cuda::device::{Buffer, Device, bytes_of};
use crate::cuda::error::CudaError;
use crate::error::KernelError;
use crate::view::MatView;

/// Matrices of one shape, one after the other, rows padded with zeros to 16 bytes.
#[derive(Debug)]
pub(super) struct Stack {
    pub buffer: Buffer,
    pub dtype: Dtype,
    /// Rows and columns of each.
    pub rows: usize,
    pub cols: usize,
    /// Numbers from row to row.
    pub stride: usize,
}

impl Stack {
    /// Uploads `matrices` of one shape, as numbers of `dtype`: see [`one_dtype`].
    pub fn upload(
        device: &Device,
        matrices: &[MatView<'_>],
        dtype: Dtype,
    ) -> Result<Self, CudaError> {
        let (rows, cols) = matrices.first().map_or((0, 0), |m| (m.rows(), m.cols()));
        for m in matrices {
            KernelError::check("rows of a matrix", rows, m.rows())?;
            KernelError::check("columns of a matrix", cols, m.cols())?;
        }
        let stride = cols.next_multiple_of(16 / dtype.size());
        for (what, count) in [("rows of a matrix", rows), ("numbers of a row", stride)] {
            CudaError::int(what, count)?;
        }
        let width = bytes_of(stride, dtype.size())?;
        let bytes = bytes_of(bytes_of(matrices.len(), rows)?, width)?;
        let mut row = Row { bytes: vec![0; width], number: usize::MAX, wide: vec![0.0; cols] };
        let mut fill = |offset: usize, to: &mut [u8]| {
            let mut at = 0;
            while at < to.len() {
                let (number, from) = ((offset + at) / width, (offset + at) % width);
                let count = (width - from).min(to.len() - at);
                if row.number != number {
                    row.read(&matrices[number / rows], number % rows, dtype);
                    row.number = number;
                }
                to[at..at + count].copy_from_slice(&row.bytes[from..from + count]);
                at += count;
            }
        };
        let buffer = device.put_weights(bytes, &mut fill)?;
        Ok(Self { buffer, dtype, rows, cols, stride })
    }

    pub fn arg(&self) -> Arg {
        self.buffer.arg()
    }

    /// Numbers from row to row, as the kernels take it.
    pub fn stride(&self) -> Arg {
        Arg::Int(self.stride as i32)
    }

    /// Rows of each matrix, as the kernels take it.
    pub fn rows(&self) -> Arg {
        Arg::Int(self.rows as i32)
    }

    /// Columns of each matrix, as the kernels take it.
    pub fn cols(&self) -> Arg {
        Arg::Int(self.cols as i32)
    }
}

/// The dtype in which matrices can lie side by side: their own if it is one, else f32, which holds them all.
pub(super) fn one_dtype<'a>(matrices: impl IntoIterator<Item = &'a MatView<'a>>) -> Dtype {
    let mut dtypes = matrices.into_iter().map(MatView::dtype);
    let first = dtypes.next().unwrap_or(Dtype::F32);
    if dtypes.all(|d| d == first) { first } else { Dtype::F32 }
}

/// A row as it is uploaded.
struct Row {
    bytes: Vec<u8>,
    number: usize,
    wide: Vec<f32>,
}

impl Row {
    fn read(&mut self, matrix: &MatView<'_>, row: usize, dtype: Dtype) {
        let stored = matrix.row(row);
        if matrix.dtype() == dtype {
            self.bytes[..stored.len()].copy_from_slice(stored);
        } else {
            matrix.widen_row(row, &mut self.wide);
            cast::narrow(&self.wide, dtype, &mut self.bytes[..self.wide.len() * dtype.size()]);
        }
    }
}

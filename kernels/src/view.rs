//! Matrices as they lie in a file.

use crate::cast::{self, Dtype};
use crate::error::KernelError;

/// A row-major matrix `[rows, cols]` of stored numbers, at any byte alignment. Copying it copies no number.
#[derive(Debug, Clone, Copy)]
pub struct MatView<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    rows: usize,
    cols: usize,
}

impl<'a> MatView<'a> {
    /// Views `bytes` as `[rows, cols]`.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not exactly `rows * cols` numbers.
    pub fn new(
        bytes: &'a [u8],
        dtype: Dtype,
        rows: usize,
        cols: usize,
    ) -> Result<Self, KernelError> {
        let expected = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
        if expected != Some(bytes.len()) {
            return Err(KernelError::Length {
                what: "matrix bytes",
                expected: expected.unwrap_or(usize::MAX),
                found: bytes.len(),
            });
        }
        Ok(Self { bytes, dtype, rows, cols })
    }

    /// Rows (output features of a linear layer).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (input features of a linear layer).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the numbers are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The bytes of all rows.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The bytes of row `row`.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let width = self.cols * self.dtype.size();
        &self.bytes[row * width..(row + 1) * width]
    }

    /// Rows `from..to` as a matrix of their own.
    pub fn slice_rows(&self, from: usize, to: usize) -> MatView<'a> {
        let width = self.cols * self.dtype.size();
        MatView { bytes: &self.bytes[from * width..to * width], rows: to - from, ..*self }
    }

    /// Row `row` as `f32`; `out` has [`MatView::cols`] values.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        cast::widen(self.row(row), self.dtype, out);
    }
}

//! Weights: views of a file, or rows computed from one when they are read.

use std::fmt::Debug;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::Arc;

use moe_merge_kernels::{Dtype, cast, elementwise};
use rayon::prelude::*;

use crate::error::CheckpointError;
use crate::map::MappedFile;

mod updated;

pub use updated::{Update, Updated};

/// A shared weight.
pub type WeightRef = Arc<dyn Weight>;

/// A floating-point tensor that can be read by rows, whether it lies in a file as it is or has to be computed.
///
/// Rows run over all axes but the last, flattened; a tensor with one axis is one row.
pub trait Weight: Debug + Send + Sync {
    /// Its shape, row-major.
    fn shape(&self) -> &[usize];

    /// The dtype in which it is stored, or in which its computed values are meant to be kept.
    fn dtype(&self) -> Dtype;

    /// Its bytes in [`Weight::dtype`], little-endian and row-major, if they exist somewhere as they are.
    fn bytes(&self) -> Option<&[u8]> {
        None
    }

    /// Writes `rows` to `out`, `rows.len() * cols` values.
    ///
    /// # Errors
    /// What computing the rows can meet; never for a plain view of a file.
    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError>;

    /// The weights that it is made of, which are prepared and released with it; none where it lies somewhere as it is.
    fn inputs(&self) -> &[WeightRef] {
        &[]
    }

    /// The file it comes from and its name there, for messages: those of the first of its inputs.
    fn origin(&self) -> (PathBuf, String) {
        self.inputs().first().map_or_else(|| (PathBuf::new(), String::new()), |w| w.origin())
    }

    /// The rows of the tensor that [`Weight::origin`] names which it is, where it is a part of one.
    fn part(&self) -> Option<Range<usize>> {
        None
    }

    /// Computes what its rows need to know about the whole of it, if it is a weight that is computed. Meant for a thread
    /// outside of the thread pool, which it lets work; whoever leaves it out has the first rows wait for it.
    ///
    /// # Errors
    /// As [`Weight::read_rows`].
    fn prepare(&self) -> Result<(), CheckpointError> {
        self.inputs().iter().try_for_each(|w| w.prepare())
    }

    /// Tells that it will not be read again soon, so that its pages may leave memory.
    fn release(&self) {
        self.inputs().iter().for_each(|w| w.release());
    }

    /// What a person should know about its numbers, which was not known before they were computed.
    fn remark(&self) -> Option<String> {
        self.inputs().iter().find_map(|w| w.remark())
    }
}

impl dyn Weight + '_ {
    /// Length of the last axis.
    pub fn cols(&self) -> usize {
        self.shape().last().copied().unwrap_or(1)
    }

    /// Product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.shape().split_last().map_or(1, |(_, rest)| rest.iter().product())
    }

    /// Numbers in the tensor.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Whether it holds no number.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in `dtype`.
    pub fn size_in(&self, dtype: Dtype) -> u64 {
        self.len() as u64 * dtype.size() as u64
    }

    /// All values as `f32`.
    ///
    /// # Errors
    /// As [`Weight::read_rows`].
    pub fn to_f32(&self) -> Result<Vec<f32>, CheckpointError> {
        let mut out = vec![0.0; self.len()];
        self.read_rows(0..self.rows(), &mut out)?;
        Ok(out)
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// [`CheckpointError::Shape`], with `why` as the reason for what was expected.
    pub fn expect_shape(&self, expected: &[usize], why: &str) -> Result<(), CheckpointError> {
        if self.shape() == expected {
            return Ok(());
        }
        let (file, tensor) = self.origin();
        Err(CheckpointError::Shape {
            file,
            tensor,
            expected: format!("{expected:?} ({why})"),
            found: self.shape().to_vec(),
        })
    }
}

/// A tensor as it lies in a memory-mapped file.
#[derive(Debug, Clone)]
pub struct MappedWeight {
    file: MappedFile,
    range: Range<usize>,
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl MappedWeight {
    /// The bytes `range` of `file` as `shape`; the caller has checked that they fit.
    pub(crate) fn new(
        file: MappedFile,
        range: Range<usize>,
        name: String,
        dtype: Dtype,
        shape: Vec<usize>,
    ) -> Self {
        debug_assert_eq!(range.len(), shape.iter().product::<usize>() * dtype.size());
        Self { file, range, name, dtype, shape }
    }
}

impl Weight for MappedWeight {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(&self.file.bytes()[self.range.clone()])
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let width = (self as &dyn Weight).cols() * self.dtype.size();
        let from = self.range.start + rows.start * width;
        let to = self.range.start + rows.end * width;
        cast::widen(&self.file.bytes()[from..to], self.dtype, out);
        Ok(())
    }

    fn origin(&self) -> (PathBuf, String) {
        (self.file.path().to_owned(), self.name.clone())
    }

    fn release(&self) {
        self.file.release(self.range.clone());
    }
}

/// A tensor held in memory: computed once (a gate, a rebuilt embedding) or made for a test.
#[derive(Debug, Clone)]
pub struct OwnedWeight {
    bytes: Vec<u8>,
    dtype: Dtype,
    shape: Vec<usize>,
    name: String,
}

impl OwnedWeight {
    /// `values` as `shape`, rounded to `dtype`.
    ///
    /// # Panics
    /// If `values` does not fill `shape`: callers make both.
    pub fn from_f32(name: &str, values: &[f32], shape: &[usize], dtype: Dtype) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "values do not fill the shape");
        let mut bytes = vec![0; values.len() * dtype.size()];
        cast::narrow(values, dtype, &mut bytes);
        Self { bytes, dtype, shape: shape.to_vec(), name: name.to_owned() }
    }

    /// All zeros.
    pub fn zeros(name: &str, shape: &[usize], dtype: Dtype) -> Self {
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.size()];
        Self { bytes, dtype, shape: shape.to_vec(), name: name.to_owned() }
    }

    /// `weight` computed once and kept in its own dtype.
    ///
    /// # Errors
    /// As [`Weight::read_rows`].
    pub fn materialise(weight: &dyn Weight) -> Result<Self, CheckpointError> {
        let (cols, rows, dtype) = (weight.cols(), weight.rows(), weight.dtype());
        let mut bytes = vec![0; weight.len() * dtype.size()];
        let width = cols * dtype.size();
        if rows * width > 0 {
            bytes
                .par_chunks_mut(ROWS_AT_ONCE * width)
                .enumerate()
                .map(|(i, out)| {
                    let from = i * ROWS_AT_ONCE;
                    let mut values = vec![0.0; out.len() / dtype.size()];
                    weight.read_rows(from..from + out.len() / width, &mut values)?;
                    cast::narrow(&values, dtype, out);
                    Ok(())
                })
                .collect::<Result<(), CheckpointError>>()?;
        }
        Ok(Self { bytes, dtype, shape: weight.shape().to_vec(), name: weight.origin().1 })
    }
}

/// Rows that are widened at a time when a whole weight is converted: bounds the scratch memory.
const ROWS_AT_ONCE: usize = 64;

impl Weight for OwnedWeight {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(&self.bytes)
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let width = (self as &dyn Weight).cols() * self.dtype.size();
        cast::widen(&self.bytes[rows.start * width..rows.end * width], self.dtype, out);
        Ok(())
    }

    fn origin(&self) -> (PathBuf, String) {
        (Path::new("(computed)").to_owned(), self.name.clone())
    }
}

/// Consecutive rows of another weight, under a shape of their own: one expert of a stacked tensor, the up half of
/// a fused gate-and-up projection.
#[derive(Debug, Clone)]
pub struct RowSlice {
    inner: WeightRef,
    rows: Range<usize>,
    shape: Vec<usize>,
}

impl RowSlice {
    /// Rows `rows` (flattened over all axes but the last) of `inner`, as `[rows.len(), cols]`.
    ///
    /// # Panics
    /// If `inner` has fewer rows: callers have checked its shape.
    pub fn new(inner: WeightRef, rows: Range<usize>) -> Self {
        assert!(rows.end <= inner.rows(), "rows beyond the weight");
        let shape = vec![rows.len(), inner.cols()];
        Self { inner, rows, shape }
    }

    /// The same numbers as a vector: for slices of biases seen as `[n, 1]`, or single rows.
    pub fn flat(mut self) -> Self {
        self.shape = vec![self.shape.iter().product()];
        self
    }
}

impl Weight for RowSlice {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn bytes(&self) -> Option<&[u8]> {
        let width = self.inner.cols() * self.inner.dtype().size();
        Some(&self.inner.bytes()?[self.rows.start * width..self.rows.end * width])
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let rows = if self.shape.len() == 1 { 0..self.rows.len() } else { rows };
        self.inner.read_rows(self.rows.start + rows.start..self.rows.start + rows.end, out)
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.inner)
    }

    fn part(&self) -> Option<Range<usize>> {
        let start = self.inner.part().map_or(0, |outer| outer.start);
        Some(start + self.rows.start..start + self.rows.end)
    }
}

/// Another weight as it is in a dtype of its own: its numbers are rounded while they are read.
#[derive(Debug, Clone)]
pub struct Retyped {
    inner: WeightRef,
    dtype: Dtype,
}

impl Retyped {
    /// `inner`, rounded to nearest even in `dtype`.
    pub fn new(inner: WeightRef, dtype: Dtype) -> Self {
        Self { inner, dtype }
    }

    /// `inner` as `dtype`; the same weight if it has that dtype.
    pub fn of(inner: WeightRef, dtype: Dtype) -> WeightRef {
        if inner.dtype() == dtype { inner } else { Arc::new(Self::new(inner, dtype)) }
    }
}

impl Weight for Retyped {
    fn shape(&self) -> &[usize] {
        self.inner.shape()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        self.inner.read_rows(rows, out)?;
        elementwise::round(out, self.dtype);
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.inner)
    }
}

/// The rows of another weight in another order: rotary heads between the two conventions of pairing dimensions.
#[derive(Debug, Clone)]
pub struct PermutedRows {
    inner: WeightRef,
    /// `order[i]` is the row of `inner` that becomes row `i`.
    order: Arc<Vec<u32>>,
}

impl PermutedRows {
    /// Row `i` becomes row `order[i]` of `inner`. A tensor with one axis (a bias) is permuted by element.
    ///
    /// # Panics
    /// If `order` does not name each row once: callers make it from the checked shape.
    pub fn new(inner: WeightRef, order: Arc<Vec<u32>>) -> Self {
        let count = if inner.shape().len() == 1 { inner.len() } else { inner.rows() };
        assert_eq!(order.len(), count, "one entry for each row");
        Self { inner, order }
    }
}

impl Weight for PermutedRows {
    fn shape(&self) -> &[usize] {
        self.inner.shape()
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        if self.inner.shape().len() == 1 {
            let all = self.inner.to_f32()?;
            for (o, &from) in out.iter_mut().zip(self.order.iter()) {
                *o = all[from as usize];
            }
            return Ok(());
        }
        let cols = self.inner.cols();
        for (o, &from) in out.chunks_exact_mut(cols.max(1)).zip(&self.order[rows]) {
            self.inner.read_rows(from as usize..from as usize + 1, o)?;
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.inner)
    }
}

/// Weights one after the other along the first axis: gate above up, expert after expert.
#[derive(Debug, Clone)]
pub struct Stacked {
    parts: Vec<WeightRef>,
    shape: Vec<usize>,
}

impl Stacked {
    /// `parts`, which agree in their last axis, as `shape`.
    ///
    /// # Panics
    /// If the parts do not fill `shape`: callers have checked theirs.
    pub fn new(parts: Vec<WeightRef>, shape: Vec<usize>) -> Self {
        let rows: usize = parts.iter().map(|p| p.rows()).sum();
        assert_eq!(rows, shape.split_last().map_or(1, |(_, r)| r.iter().product()), "rows");
        assert!(parts.iter().all(|p| Some(&p.cols()) == shape.last()), "columns");
        Self { parts, shape }
    }
}

impl Weight for Stacked {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        let first = self.parts.first().map_or(Dtype::F32, |p| p.dtype());
        if self.parts.iter().all(|p| p.dtype() == first) { first } else { Dtype::F32 }
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let cols = (self as &dyn Weight).cols();
        let (mut start, mut done) = (0, 0);
        for part in &self.parts {
            let end = start + part.rows();
            let (from, to) = (rows.start.max(start), rows.end.min(end));
            if from < to {
                let n = (to - from) * cols;
                part.read_rows(from - start..to - start, &mut out[done..done + n])?;
                done += n;
            }
            start = end;
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        &self.parts
    }
}

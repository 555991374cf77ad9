//! Weights with an adapter on top, computed row by row while they are read.

use std::ops::Range;
use std::slice;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use moe_merge_kernels::{Dtype, cast};

use crate::error::CheckpointError;
use crate::weight::{MappedWeight, Update, Updated, Weight, WeightRef};

/// A matrix `[rows, cols]` inside a stored tensor, by strides: a LoRA factor, its transpose, the part of one expert.
#[derive(Debug, Clone)]
pub(super) struct Factor {
    weight: Arc<MappedWeight>,
    pub rows: usize,
    pub cols: usize,
    offset: usize,
    row_stride: usize,
    col_stride: usize,
}

impl Factor {
    /// All of `weight`, which has two axes.
    pub fn new(weight: &Arc<MappedWeight>) -> Self {
        let shape = weight.shape();
        let (rows, cols) = (shape[0], shape[1]);
        Self { weight: weight.clone(), rows, cols, offset: 0, row_stride: cols, col_stride: 1 }
    }

    /// Rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows `from..from + count`.
    pub fn rows_from(mut self, from: usize, count: usize) -> Self {
        debug_assert!(from + count <= self.rows);
        self.offset += from * self.row_stride;
        self.rows = count;
        self
    }

    /// Columns `first`, `first + step`, …, `count` of them.
    pub fn cols_by(mut self, first: usize, step: usize, count: usize) -> Self {
        debug_assert!(count == 0 || first + (count - 1) * step < self.cols);
        self.offset += first * self.col_stride;
        self.col_stride *= step;
        self.cols = count;
        self
    }

    /// Rows `rows` as `f32`; `out` is `[rows, cols]`.
    pub fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        let bytes = self.weight.bytes().expect("a mapped weight has bytes");
        let (dtype, size) = (self.weight.dtype(), self.weight.dtype().size());
        let widen = |at: usize, out: &mut [f32]| {
            cast::widen(&bytes[at * size..(at + out.len()) * size], dtype, out);
        };
        if self.col_stride == 1 {
            for (row, out) in rows.zip(out.chunks_exact_mut(self.cols.max(1))) {
                widen(self.offset + row * self.row_stride, out);
            }
        } else if self.row_stride == 1 {
            let mut column = vec![0.0; rows.len()];
            for col in 0..self.cols {
                widen(self.offset + rows.start + col * self.col_stride, &mut column);
                for (value, out) in column.iter().zip(out[col..].iter_mut().step_by(self.cols)) {
                    *out = *value;
                }
            }
        } else {
            for (row, out) in rows.zip(out.chunks_exact_mut(self.cols.max(1))) {
                for (col, out) in out.iter_mut().enumerate() {
                    let at = self.offset + row * self.row_stride + col * self.col_stride;
                    widen(at, std::slice::from_mut(out));
                }
            }
        }
    }
}

/// Columns computed together: their sums stay in registers, and the part of the right factor in the first cache.
const TILE: usize = 32;

/// The right factor in tiles: `[cols / TILE, rank, TILE]`, the last tile filled up with zeros.
#[derive(Debug)]
struct Tiled {
    tiles: Vec<[f32; TILE]>,
    rank: usize,
    cols: usize,
}

impl Tiled {
    fn new(right: &Factor) -> Self {
        let (rank, cols) = (right.rows, right.cols);
        let mut tiles = vec![[0.0; TILE]; rank * cols.div_ceil(TILE)];
        let mut row = vec![0.0; cols];
        for j in 0..rank {
            right.read(j..j + 1, &mut row);
            for (t, part) in row.chunks(TILE).enumerate() {
                tiles[t * rank + j][..part.len()].copy_from_slice(part);
            }
        }
        Self { tiles, rank, cols }
    }

    /// `out += scale · left · right`, `left` `[rows, rank]`, `out` `[rows, cols]`.
    ///
    /// Every number is a sum over the rank in its order, so it does not depend on which rows are asked for together.
    fn add(&self, left: &[f32], scale: f32, out: &mut [f32]) {
        for (t, tile) in self.tiles.chunks_exact(self.rank).enumerate() {
            let from = t * TILE;
            let to = self.cols.min(from + TILE);
            let rows = left.chunks_exact(self.rank).zip(out.chunks_exact_mut(self.cols));
            for (left, out) in rows {
                let mut sum = [0f32; TILE];
                for (l, right) in left.iter().zip(tile) {
                    for (s, r) in sum.iter_mut().zip(right) {
                        *s += l * r;
                    }
                }
                // A length known when compiling lets the sums stay in registers: ten times the speed.
                match <&mut [f32; TILE]>::try_from(&mut out[from..to]) {
                    Ok(out) => {
                        for (o, s) in out.iter_mut().zip(&sum) {
                            *o += scale * s;
                        }
                    }
                    Err(_) => {
                        let sum = sum.map(|s| scale * s);
                        for (o, s) in out[from..to].iter_mut().zip(&sum) {
                            *o += s;
                        }
                    }
                }
            }
        }
    }
}

/// `ΔW = s · L · R`, `L` `[rows, r]`, `R` `[r, cols]`.
#[derive(Debug)]
pub(super) struct LowRank {
    left: Factor,
    right: Factor,
    pub scale: f32,
    /// `R` as the product wants it, from the first read until the weight is released.
    tiled: Mutex<Option<Arc<Tiled>>>,
}

impl LowRank {
    /// The product of two factors that fit each other.
    pub fn new(left: Factor, right: Factor, scale: f32) -> Self {
        debug_assert_eq!(left.cols, right.rows);
        Self { left, right, scale, tiled: Mutex::new(None) }
    }
}

impl Update for LowRank {
    fn shape(&self) -> [usize; 2] {
        [self.left.rows, self.right.cols]
    }

    fn add(&self, rows: Range<usize>, out: &mut [f32]) {
        let tiled = {
            let mut kept = self.tiled.lock().unwrap_or_else(PoisonError::into_inner);
            kept.get_or_insert_with(|| Arc::new(Tiled::new(&self.right))).clone()
        };
        let mut left = vec![0.0; rows.len() * self.left.cols];
        self.left.read(rows, &mut left);
        tiled.add(&left, self.scale, out);
    }

    fn release(&self) {
        *self.tiled.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.left.weight.release();
        self.right.weight.release();
    }
}

/// Along which axis of the stored weight DoRA takes its norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NormAxis {
    /// One norm per stored row: linear layers.
    Row,
    /// One per stored column: embeddings, and linear layers stored `[in, out]`.
    Column,
}

/// Rows whose squares are summed at a time for the norms of columns.
const NORM_ROWS: usize = 64;

/// `m / ‖W + s·L·R‖ · (W + s·L·R)`.
#[derive(Debug)]
pub(super) struct Dora {
    sum: Updated<LowRank>,
    magnitude: Vec<f32>,
    axis: NormAxis,
    /// `m / norm` per column, computed at the first read: one pass over the weight.
    column_factors: OnceLock<Vec<f32>>,
}

impl Dora {
    /// `magnitude` has one number per row or column of the weight, as `axis` says.
    pub fn new(sum: Updated<LowRank>, magnitude: Vec<f32>, axis: NormAxis) -> Self {
        Self { sum, magnitude, axis, column_factors: OnceLock::new() }
    }

    fn column_factors(&self) -> Result<&[f32], CheckpointError> {
        if let Some(factors) = self.column_factors.get() {
            return Ok(factors);
        }
        let weight = &self.sum as &dyn Weight;
        let (rows, cols) = (weight.rows(), weight.cols());
        let mut squares = vec![0f64; cols];
        let mut block = vec![0.0; NORM_ROWS.min(rows) * cols];
        for from in (0..rows).step_by(NORM_ROWS) {
            let to = rows.min(from + NORM_ROWS);
            let block = &mut block[..(to - from) * cols];
            weight.read_rows(from..to, block)?;
            for row in block.chunks_exact(cols) {
                for (sum, v) in squares.iter_mut().zip(row) {
                    *sum += f64::from(*v) * f64::from(*v);
                }
            }
        }
        let factors = squares
            .iter()
            .zip(&self.magnitude)
            .enumerate()
            .map(|(col, (sum, m))| self.factor(*m, *sum, col))
            .collect::<Result<Vec<f32>, _>>()?;
        // Another thread may have been faster, with the same numbers.
        Ok(self.column_factors.get_or_init(|| factors))
    }

    /// `m / √squares`; `at` is the flat index of the first number that it scales.
    fn factor(&self, m: f32, squares: f64, at: usize) -> Result<f32, CheckpointError> {
        let factor = m / squares.sqrt() as f32;
        if factor.is_finite() {
            return Ok(factor);
        }
        let (file, tensor) = self.origin();
        Err(CheckpointError::NotFinite { file, tensor, index: at })
    }
}

impl Weight for Dora {
    fn shape(&self) -> &[usize] {
        self.sum.shape()
    }

    fn dtype(&self) -> Dtype {
        self.sum.dtype()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let cols = (self as &dyn Weight).cols().max(1);
        self.sum.read_rows(rows.clone(), out)?;
        match self.axis {
            NormAxis::Row => {
                for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
                    let squares = out.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
                    let factor = self.factor(self.magnitude[row], squares, row * cols)?;
                    out.iter_mut().for_each(|v| *v *= factor);
                }
            }
            NormAxis::Column => {
                let factors = self.column_factors()?;
                for out in out.chunks_exact_mut(cols) {
                    out.iter_mut().zip(factors).for_each(|(v, f)| *v *= f);
                }
            }
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        self.sum.inputs()
    }

    fn release(&self) {
        self.sum.release();
    }
}

/// A weight some of whose rows are replaced: trained tokens of an embedding.
#[derive(Debug)]
pub(super) struct ReplacedRows {
    pub base: WeightRef,
    /// Row of the base, row of `values`; sorted.
    pub rows: Vec<(usize, usize)>,
    /// `[rows.len(), cols]`.
    pub values: Factor,
}

impl Weight for ReplacedRows {
    fn shape(&self) -> &[usize] {
        self.base.shape()
    }

    fn dtype(&self) -> Dtype {
        self.base.dtype()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        self.base.read_rows(rows.clone(), out)?;
        let cols = self.values.cols;
        let first = self.rows.partition_point(|(row, _)| *row < rows.start);
        for (row, from) in self.rows[first..].iter().take_while(|(row, _)| *row < rows.end) {
            let at = (row - rows.start) * cols;
            self.values.read(*from..*from + 1, &mut out[at..at + cols]);
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.base)
    }
}

/// A weight meant to be kept in another dtype than it is stored in: a replacement out of an adapter in `f32`.
#[derive(Debug)]
pub(super) struct Recast {
    pub inner: WeightRef,
    pub dtype: Dtype,
}

impl Weight for Recast {
    fn shape(&self) -> &[usize] {
        self.inner.shape()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn bytes(&self) -> Option<&[u8]> {
        self.inner.bytes().filter(|_| self.inner.dtype() == self.dtype)
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        self.inner.read_rows(rows, out)
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.inner)
    }
}

//! Weights to which something is added while they are read.

use std::fmt::Debug;
use std::ops::Range;
use std::slice;

use moe_merge_kernels::Dtype;

use super::{Weight, WeightRef};
use crate::error::CheckpointError;

/// A matrix that is added to a weight, computed row by row.
pub trait Update: Debug + Send + Sync {
    /// `[rows, cols]`.
    fn shape(&self) -> [usize; 2];

    /// Adds its rows `rows` to `out`, `[rows, cols]`.
    fn add(&self, rows: Range<usize>, out: &mut [f32]);

    /// Lets go of what was kept for the next read.
    fn release(&self) {}
}

/// A weight and an update of all of its rows, or of some, in `f32`; whoever stores it rounds once to the weight's dtype.
#[derive(Debug)]
pub struct Updated<U> {
    base: WeightRef,
    from: usize,
    update: U,
}

impl<U: Update> Updated<U> {
    /// `base` with `update` on its rows from `from` on, which have to be there.
    pub fn new(base: WeightRef, from: usize, update: U) -> Self {
        debug_assert!(from + update.shape()[0] <= base.rows());
        debug_assert_eq!(update.shape()[1], base.cols());
        Self { base, from, update }
    }
}

impl<U: Update> Weight for Updated<U> {
    fn shape(&self) -> &[usize] {
        self.base.shape()
    }

    fn dtype(&self) -> Dtype {
        self.base.dtype()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        self.base.read_rows(rows.clone(), out)?;
        let [count, cols] = self.update.shape();
        let (from, to) = (rows.start.max(self.from), rows.end.min(self.from + count));
        if from < to {
            let out = &mut out[(from - rows.start) * cols..(to - rows.start) * cols];
            self.update.add(from - self.from..to - self.from, out);
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.base)
    }

    fn release(&self) {
        self.base.release();
        self.update.release();
    }
}

//! Rows of an embedding in the order of another vocabulary.

use std::ops::Range;
use std::slice;
use std::sync::{Arc, OnceLock};

use moe_merge_checkpoint::{CheckpointError, Dtype, Weight, WeightRef};

/// Where a row comes from that a model does not have.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Fill {
    /// Zeros.
    Zero,
    /// A row of one model.
    Row(usize, u32),
    /// The mean of rows of several.
    Mean(Vec<(usize, u32)>),
}

/// An embedding, or what else has one row for each token, in the order of another vocabulary.
#[derive(Debug)]
pub(super) struct Mapped {
    inner: WeightRef,
    own: Arc<Vec<Option<u32>>>,
    fill: Arc<Vec<Fill>>,
    force: Arc<Vec<bool>>,
    lenders: Arc<Vec<Option<WeightRef>>>,
    tokens: usize,
    shape: Vec<usize>,
    /// Mean of the rows of all tokens, which padding gets.
    padding: OnceLock<Vec<f32>>,
}

impl Mapped {
    /// * `[tokens, rows]`: output rows that stand for a token, and all of them
    pub fn new(
        inner: WeightRef,
        own: Arc<Vec<Option<u32>>>,
        fill: Arc<Vec<Fill>>,
        force: Arc<Vec<bool>>,
        lenders: Arc<Vec<Option<WeightRef>>>,
        [tokens, rows]: [usize; 2],
    ) -> Self {
        let mut shape = inner.shape().to_vec();
        shape[0] = rows;
        Self { inner, own, fill, force, lenders, tokens, shape, padding: OnceLock::new() }
    }

    /// Numbers for each token.
    fn width(&self) -> usize {
        self.shape[1..].iter().product()
    }

    fn row(&self, j: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
        if j >= self.tokens {
            out.copy_from_slice(self.padding()?);
            return Ok(());
        }
        match self.own[j].filter(|_| !self.force[j]) {
            Some(row) => one(&self.inner, row, out),
            None => self.filled(&self.fill[j], out),
        }
    }

    fn filled(&self, fill: &Fill, out: &mut [f32]) -> Result<(), CheckpointError> {
        out.fill(0.0);
        let rows = match fill {
            Fill::Zero => return Ok(()),
            Fill::Row(model, row) => &[(*model, *row)][..],
            Fill::Mean(rows) => rows,
        };
        let mut values = vec![0.0; out.len()];
        let mut count = 0f32;
        for (model, row) in rows {
            let Some(lender) = &self.lenders[*model] else { continue };
            one(lender, *row, &mut values)?;
            out.iter_mut().zip(&values).for_each(|(o, v)| *o += v);
            count += 1.0;
        }
        if count > 1.0 {
            out.iter_mut().for_each(|o| *o /= count);
        }
        Ok(())
    }

    fn padding(&self) -> Result<&[f32], CheckpointError> {
        if let Some(mean) = self.padding.get() {
            return Ok(mean);
        }
        let mut sums = vec![0f64; self.width()];
        let mut values = vec![0.0; self.width()];
        for j in 0..self.tokens {
            self.row(j, &mut values)?;
            sums.iter_mut().zip(&values).for_each(|(s, v)| *s += f64::from(*v));
        }
        let mean = sums.iter().map(|s| (s / self.tokens.max(1) as f64) as f32).collect();
        Ok(self.padding.get_or_init(|| mean))
    }
}

/// Row `row` of a weight whose first axis counts tokens.
fn one(weight: &WeightRef, row: u32, out: &mut [f32]) -> Result<(), CheckpointError> {
    if weight.shape().len() == 1 {
        // A bias: one number for each token, of which a weight reads all.
        out[0] = weight.to_f32()?[row as usize];
        return Ok(());
    }
    let per_token: usize = weight.shape()[1..weight.shape().len() - 1].iter().product();
    let first = row as usize * per_token;
    weight.read_rows(first..first + per_token, out)
}

impl Weight for Mapped {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let tokens = if self.shape.len() == 1 { 0..self.shape[0] } else { rows };
        for (j, out) in tokens.zip(out.chunks_exact_mut(self.width().max(1))) {
            self.row(j, out)?;
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.inner)
    }
}

#[cfg(test)]
mod tests {
    use moe_merge_checkpoint::weight::OwnedWeight;

    use super::*;

    #[test]
    fn every_kind_of_row() {
        let weight = |values: &[f32]| -> WeightRef {
            Arc::new(OwnedWeight::from_f32("e", values, &[values.len() / 2, 2], Dtype::F32))
        };
        let (a, b) = (weight(&[1.0, 2.0, 3.0, 4.0]), weight(&[5.0, 6.0, 7.0, 8.0]));
        let own = vec![Some(1), None, None, None, Some(0)];
        let fill = vec![
            Fill::Zero,
            Fill::Row(1, 1),
            Fill::Mean(vec![(0, 0), (1, 0)]),
            Fill::Zero,
            Fill::Row(1, 0),
        ];
        let force = vec![false, false, false, false, true];
        let lenders = Arc::new(vec![Some(a.clone()), Some(b)]);
        let mapped: WeightRef =
            Arc::new(Mapped::new(a, own.into(), fill.into(), force.into(), lenders, [5, 6]));
        let rows = [3.0, 4.0, 7.0, 8.0, 3.0, 4.0, 0.0, 0.0, 5.0, 6.0];
        let means = [18.0 / 5.0, 22.0 / 5.0];
        assert_eq!(mapped.shape(), [6, 2]);
        assert_eq!(mapped.to_f32().unwrap(), [&rows[..], &means].concat());
    }
}

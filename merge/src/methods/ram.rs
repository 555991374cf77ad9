//! `ram`: differences that one model alone made, whole; those of several, as their mean.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};

use super::gram::subtract;
use super::{Base, Combine, Group, Method, Parameter, Scope, number, read, round};

/// `B + d` for each number: `d` is the one difference above `epsilon`, or the mean of those above it. Rounded to the dtype
/// of the arithmetic after each step.
pub(super) const METHOD: Method = Method {
    name: "ram",
    summary: "changes that one model alone made, whole; changes of several, as their mean",
    formula: "B + sum of the active d/c, d = W - B active where |d| > epsilon, c = number of active ones",
    parameters: &[EPSILON],
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: false,
    activations: None,
    source: "Reinforced Agent Merging 2026, arXiv:2601.13572",
    build,
};

pub(super) const EPSILON: Parameter =
    number("epsilon", Scope::Global, Some(1e-5), "changes up to this count as none")
        .within(0.0, f64::INFINITY);

/// What both methods have in common.
#[derive(Debug)]
pub(super) struct Active {
    pub base: usize,
    pub others: Vec<usize>,
    pub epsilon: f32,
    pub dtype: Dtype,
}

impl Active {
    pub fn new(group: &Group) -> Result<Self, String> {
        let (base, others) = (group.required_base()?, group.others());
        Ok(Self { base, others, epsilon: group.global[0] as f32, dtype: group.dtype })
    }

    /// Number of active differences at `i`.
    pub fn count(&self, differences: &[Vec<f32>], i: usize) -> usize {
        differences.iter().filter(|d| d[i].abs() > self.epsilon).count()
    }

    /// Rows of the result; `alone[m]` multiplies what model `m` changed alone.
    pub fn rows(
        &self,
        alone: &[f32],
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        inputs[self.base].read_rows(rows.clone(), out)?;
        let mut differences = vec![Vec::new(); self.others.len()];
        for (d, &m) in differences.iter_mut().zip(&self.others) {
            subtract(&read(&inputs[m], rows.clone())?, out, self.dtype, d);
        }
        for (i, o) in out.iter_mut().enumerate() {
            let count = self.count(&differences, i);
            let mut sum = 0f32;
            for (d, alone) in differences.iter().zip(alone) {
                if d[i].abs() > self.epsilon {
                    let part = if count == 1 { d[i] * alone } else { d[i] / count as f32 };
                    sum += round(part, self.dtype);
                }
            }
            *o = round(*o + round(sum, self.dtype), self.dtype);
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Ram(Active);

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Ok(Box::new(Ram(Active::new(group)?)))
}

impl Combine for Ram {
    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        self.0.rows(&vec![1.0; self.0.others.len()], inputs, rows, out)
    }
}

//! `sce`: select, calculate, erase.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};

use super::gram::subtract;
use super::order::{Cut, Keyed, magnitude};
use super::scan::Block;
use super::{Base, Combine, Group, Method, Once, Scope, flag, number, read, round, scan};

/// Keeps the `select_topk` places where the differences vary most between the models, weighs each model by its mean square
/// there, and per number averages those with the sign of the sum. Rounded to the dtype of the arithmetic after each step.
pub(super) const METHOD: Method = Method {
    name: "sce",
    summary: "changes at the places where models vary most, weighed by their mean square",
    formula: "B + sum v d/sum v over the d = selected W - B whose sign is that of sum d, v = mean d^2, \
              all alike where the means add up to less than 1e-6",
    parameters: &[
        number("select_topk", Scope::Global, Some(1.0), "share of the places that is kept")
            .within(0.0, 1.0),
        flag("int8_mask", false, "accepted; changes no number"),
    ],
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Wan et al. 2024, FuseChat, arXiv:2408.07990",
    build,
};

#[derive(Debug)]
struct Sce {
    base: usize,
    others: Vec<usize>,
    select_topk: f64,
    dtype: Dtype,
    facts: Once<Facts>,
}

#[derive(Debug)]
struct Facts {
    /// Places that are kept, by variance; `None`: all.
    cut: Option<Cut>,
    /// Weight of each model.
    weights: Vec<f32>,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let (base, others) = (group.required_base()?, group.others());
    let (select_topk, dtype) = (group.global[0], group.dtype);
    Ok(Box::new(Sce { base, others, select_topk, dtype, facts: Once::default() }))
}

/// Variance of the `i`-th numbers, over the models.
fn variance(differences: &[Vec<f32>], i: usize) -> f32 {
    let n = differences.len() as f32;
    let mean = differences.iter().map(|d| d[i]).sum::<f32>() / n;
    differences.iter().map(|d| (d[i] - mean).powi(2)).sum::<f32>() / n
}

impl Sce {
    /// Differences to the base, from blocks of the models and then the base.
    fn differences(&self, blocks: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let base = &blocks[self.others.len()];
        let mut differences = vec![Vec::new(); self.others.len()];
        differences.iter_mut().zip(blocks).for_each(|(d, w)| subtract(w, base, self.dtype, d));
        differences
    }

    fn find(&self, inputs: &[WeightRef]) -> Result<Facts, CheckpointError> {
        let tensors = self.others.iter().chain([&self.base]).map(|&m| &inputs[m]);
        let tensors: Vec<&WeightRef> = tensors.collect();
        let variances = |blocks: &[Vec<f32>], out: &mut Vec<u32>| {
            let d = self.differences(blocks);
            out.extend((0..blocks[0].len()).map(|i| magnitude(round(variance(&d, i), self.dtype))));
        };
        let cut = match self.select_topk {
            k if k >= 1.0 => None,
            k if k <= 0.0 || self.others.is_empty() => Some(Cut::NONE),
            k => {
                let start = |_| (0u64, Vec::new());
                let parts = scan(&tensors, start, |(count, keys), _, blocks| {
                    keys.clear();
                    variances(blocks, keys);
                    *count += keys.iter().filter(|k| **k != 0).count() as u64;
                })?;
                let varying: u64 = parts.iter().map(|p| p.0).sum();
                // The reference takes this product in f32.
                let keep = (varying as f32 * k as f32) as u64;
                Keyed { inputs: &tensors, keys: variances, short: false }
                    .cuts(&[keep])?
                    .first()
                    .copied()
            }
        };
        let squares = scan(
            &tensors,
            |_| vec![0f64; self.others.len()],
            |sums, first, blocks| {
                let d = self.differences(blocks);
                for i in 0..blocks[0].len() {
                    if self.kept(cut, &d, i, first + i) {
                        sums.iter_mut().zip(&d).for_each(|(s, d)| *s += f64::from(d[i]).powi(2));
                    }
                }
            },
        )?;
        let n = inputs[self.base].len().max(1) as f64;
        let mean = |m: usize| squares.iter().map(|s| s[m]).sum::<f64>() / n;
        let means: Vec<f64> = (0..self.others.len()).map(mean).collect();
        let total: f64 = means.iter().sum();
        let alike = 1.0 / self.others.len() as f64;
        let weight = |m: &f64| (if total < 1e-6 { alike } else { m / total }) as f32;
        let weights = means.iter().map(|m| round(weight(m), self.dtype)).collect();
        Ok(Facts { cut, weights })
    }

    fn kept(&self, cut: Option<Cut>, differences: &[Vec<f32>], i: usize, index: usize) -> bool {
        let key = || magnitude(round(variance(differences, i), self.dtype));
        cut.is_none_or(|cut| cut.keeps(key(), index))
    }
}

impl Combine for Sce {
    fn prepare(&self, inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        self.facts.get(|| self.find(inputs)).map(|_| ())
    }

    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let facts = self.facts.get(|| self.find(inputs))?;
        let first = rows.start * inputs[self.base].cols();
        let order = self.others.iter().chain([&self.base]);
        let block = |&m: &usize| read(&inputs[m], rows.clone()).map(Block::into_vec);
        let blocks: Result<Vec<_>, _> = order.map(block).collect();
        let mut blocks = blocks?;
        let differences = self.differences(&blocks);
        out.copy_from_slice(&blocks.pop().unwrap_or_default());
        for (i, o) in out.iter_mut().enumerate() {
            if !self.kept(facts.cut, &differences, i, first + i) {
                continue;
            }
            let sum: f32 = differences.iter().map(|d| d[i]).sum();
            let positive = round(sum, self.dtype) >= 0.0;
            let (mut sum, mut divisor) = (0f32, 0f32);
            for (d, weight) in differences.iter().zip(&facts.weights) {
                if d[i] != 0.0 && (d[i] > 0.0) == positive {
                    sum += round(d[i] * weight, self.dtype);
                    divisor += weight;
                }
            }
            let divisor = round(divisor, self.dtype).max(1e-6);
            *o = round(*o + round(round(sum, self.dtype) / divisor, self.dtype), self.dtype);
        }
        Ok(())
    }
}

//! `sce`: select, calculate, erase.

use std::ops::{Deref, Range};

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};
use moe_merge_kernels::elementwise;

use super::order::{Cut, Keyed};
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

impl Sce {
    /// Differences to the base, from blocks of the models and then the base.
    fn differences(&self, blocks: &[impl Deref<Target = [f32]>]) -> Vec<Block> {
        let (others, base) = blocks.split_at(self.others.len());
        let difference = |w: &_| {
            let mut d = Block::new(base[0].len());
            elementwise::subtract(w, &base[0], self.dtype, &mut d);
            d
        };
        others.iter().map(|w| difference(&**w)).collect()
    }

    /// Variance of each number over the models.
    fn variances(&self, differences: &[Block], count: usize) -> Block {
        let n = differences.len() as f32;
        let mut mean = Block::zeros(count);
        differences.iter().for_each(|d| elementwise::add(&mut mean, d));
        elementwise::divide(&mut mean, n);
        let mut variance = Block::zeros(count);
        differences
            .iter()
            .for_each(|d| elementwise::add_squared_difference(&mut variance, d, &mean));
        elementwise::divide(&mut variance, n);
        elementwise::round(&mut variance, self.dtype);
        variance
    }

    /// The differences with zeros at the places that are not kept.
    fn selected(
        &self,
        cut: Option<Cut>,
        blocks: &[impl Deref<Target = [f32]>],
        first: usize,
    ) -> Vec<Block> {
        let mut differences = self.differences(blocks);
        if let Some(cut) = cut {
            let variance = self.variances(&differences, blocks[0].len());
            differences.iter_mut().for_each(|d| cut.keep_where(&variance, d, first));
        }
        differences
    }

    fn find(&self, inputs: &[WeightRef]) -> Result<Facts, CheckpointError> {
        let tensors = self.others.iter().chain([&self.base]).map(|&m| &inputs[m]);
        let tensors: Vec<&WeightRef> = tensors.collect();
        let variances = |_: usize, blocks: &[Vec<f32>], out: &mut Vec<u32>| {
            let variance = self.variances(&self.differences(blocks), blocks[0].len());
            out.resize(variance.len(), 0);
            elementwise::magnitudes(&variance, out);
        };
        let cut = match self.select_topk {
            k if k >= 1.0 => None,
            k if k <= 0.0 || self.others.is_empty() => Some(Cut::NONE),
            k => {
                let start = |_| (0u64, Vec::new());
                let parts = scan(&tensors, start, |(count, keys), first, blocks| {
                    variances(first, blocks, keys);
                    *count += keys.iter().filter(|k| **k != 0).count() as u64;
                })?;
                let varying: u64 = parts.iter().map(|p| p.0).sum();
                // The reference takes this product in f32.
                let keep = (varying as f32 * k as f32) as u64;
                let short = self.dtype == Dtype::BF16;
                let keyed = Keyed { inputs: &tensors, keys: variances, short };
                keyed.cuts(&[keep])?.first().copied()
            }
        };
        let squares = scan(
            &tensors,
            |_| vec![0f64; self.others.len()],
            |sums, first, blocks| {
                let differences = self.selected(cut, blocks, first);
                sums.iter_mut().zip(&differences).for_each(|(s, d)| elementwise::add_dot(d, d, s));
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
        let (dtype, count) = (self.dtype, out.len());
        let first = rows.start * inputs[self.base].cols();
        let order = self.others.iter().chain([&self.base]);
        let blocks: Result<Vec<_>, _> = order.map(|&m| read(&inputs[m], rows.clone())).collect();
        let blocks = blocks?;
        let mut differences = self.selected(facts.cut, &blocks, first);
        out.copy_from_slice(&blocks[self.others.len()]);
        let mut all = Block::zeros(count);
        differences.iter().for_each(|d| elementwise::add(&mut all, d));
        elementwise::round(&mut all, dtype);
        let (mut sum, mut divisors) = (Block::zeros(count), Block::zeros(count));
        for (d, weight) in differences.iter_mut().zip(&facts.weights) {
            elementwise::scale(d, *weight, dtype);
            elementwise::add_agreeing(d, *weight, &all, &mut sum, &mut divisors);
        }
        elementwise::round(&mut sum, dtype);
        elementwise::round(&mut divisors, dtype);
        divisors.iter_mut().for_each(|d| *d = d.max(1e-6));
        elementwise::divide_each(&mut sum, &divisors);
        elementwise::round(&mut sum, dtype);
        elementwise::add(out, &sum);
        elementwise::round(out, dtype);
        Ok(())
    }
}

//! What the methods on differences to a base (task vectors) have in common.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};
use moe_merge_kernels::elementwise;

use super::scan::Block;
use super::sparsify::{self, Sparse, Sparsifier, Wanted};
use super::{Combine, Group, Once, Parameter, Scope, flag, number, read, round};

const WEIGHT: Parameter =
    number("weight", Scope::Model, None, "weight of this model's task vector");
const DENSITY: Parameter =
    number("density", Scope::Model, Some(1.0), "share of the task vector that is kept")
        .within(0.0, 1.0);
const LAMBDA: Parameter =
    number("lambda", Scope::Global, Some(1.0), "factor on the merged task vector");
const RESCALE: &str = "restore the sum of absolute values after sparsifying";
const INT8_MASK: Parameter = flag("int8_mask", false, "accepted; changes no number");

/// The parameters of the family: those of models first.
pub(super) const fn parameters(normalize: bool, rescale: bool) -> [Parameter; 6] {
    let normalize = flag("normalize", normalize, "divide by the sum of the weights");
    [WEIGHT, DENSITY, normalize, LAMBDA, flag("rescale", rescale, RESCALE), INT8_MASK]
}

/// The same with one more parameter of models.
pub(super) const fn parameters_with(
    extra: Parameter,
    normalize: bool,
    rescale: bool,
) -> [Parameter; 7] {
    let [weight, density, normalize, lambda, rescale, mask] = parameters(normalize, rescale);
    [weight, density, extra, normalize, lambda, rescale, mask]
}

/// `gamma` of the methods that leave out the largest.
pub(super) const GAMMA: Parameter =
    number("gamma", Scope::Model, Some(0.01), "share of the largest changes that is left out")
        .within(0.0, 1.0);

/// `epsilon` of the methods that choose by rank.
pub(super) const EPSILON: Parameter = number(
    "epsilon",
    Scope::Model,
    Some(0.15),
    "chances of a row run from `density - epsilon` to `density + epsilon`",
)
.within(0.0, 1.0);

/// A method of the family.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// What is kept of each task vector.
    pub sparsifier: Sparsifier,
    /// Whether only what agrees in sign with the weighted sum is merged.
    pub consensus: bool,
}

/// `B + lambda D/q` with `D` the sum of the weighted task vectors, `q` that of the weights or 1.
#[derive(Debug)]
struct TaskVectors {
    base: usize,
    /// The inputs that are not the base.
    others: Vec<usize>,
    /// Weight of each of them, rounded to the dtype of the arithmetic.
    weights: Vec<f32>,
    /// What is kept of each of them.
    wanted: Vec<Wanted>,
    found: Vec<Once<Sparse>>,
    consensus: bool,
    normalize: bool,
    lambda: f32,
    dtype: Dtype,
}

impl Family {
    /// The method for one tensor.
    pub fn build(self, group: &Group) -> Result<Box<dyn Combine>, String> {
        let others = group.others();
        let [normalize, lambda, rescale] = [group.global[0], group.global[1], group.global[2]];
        let wanted: Vec<Wanted> = others
            .iter()
            .map(|&m| Wanted {
                sparsifier: self.sparsifier,
                density: group.own[m][1],
                extra: if group.own[m].len() > 2 { group.own[m][2] } else { 0.0 },
                rescale: rescale != 0.0,
                key: sparsify::key(group.seed, &group.name, m),
            })
            .collect();
        for w in wanted.iter().filter(|w| self.sparsifier == Sparsifier::ByRank && w.density < 1.0)
        {
            if w.density > 0.0 && (w.density + w.extra >= 1.0 || w.density - w.extra <= 0.0) {
                return Err(format!(
                    "`density` {} with `epsilon` {}: their sum has to be below 1 and their difference above 0",
                    w.density, w.extra
                ));
            }
        }
        Ok(Box::new(TaskVectors {
            base: group.required_base()?,
            weights: others.iter().map(|&m| round(group.own[m][0] as f32, group.dtype)).collect(),
            found: others.iter().map(|_| Once::default()).collect(),
            others,
            wanted,
            consensus: self.consensus,
            normalize: normalize != 0.0,
            lambda: lambda as f32,
            dtype: group.dtype,
        }))
    }
}

impl TaskVectors {
    fn sparse(&self, inputs: &[WeightRef], i: usize) -> Result<&Sparse, CheckpointError> {
        let (model, base) = (&inputs[self.others[i]], &inputs[self.base]);
        self.found[i].get(|| self.wanted[i].find(model, base, self.dtype))
    }

    /// The sum of the weighted task vectors, divided if that is wanted.
    fn sum(&self, weighted: &[Block], count: usize) -> Block {
        let mut sum = Block::zeros(count);
        weighted.iter().for_each(|p| elementwise::add(&mut sum, p));
        elementwise::round(&mut sum, self.dtype);
        let total: f32 = self.weights.iter().sum();
        let divisor = if total.abs() < 1e-8 { 1.0 } else { round(total, self.dtype) };
        if self.normalize && divisor != 1.0 {
            elementwise::divide(&mut sum, divisor);
            elementwise::round(&mut sum, self.dtype);
        }
        sum
    }

    /// As [`Self::sum`], of what has the sign of the sum of all.
    fn vote(&self, weighted: &[Block], count: usize) -> Block {
        let mut all = Block::zeros(count);
        weighted.iter().for_each(|p| elementwise::add(&mut all, p));
        elementwise::round(&mut all, self.dtype);
        let (mut sum, mut weights) = (Block::zeros(count), Block::zeros(count));
        for (weight, p) in self.weights.iter().zip(weighted) {
            elementwise::add_agreeing(p, *weight, &all, &mut sum, &mut weights);
        }
        elementwise::round(&mut sum, self.dtype);
        if self.normalize {
            elementwise::round(&mut weights, self.dtype);
            elementwise::divide_each(&mut sum, &weights);
            elementwise::round(&mut sum, self.dtype);
        }
        sum
    }
}

impl Combine for TaskVectors {
    fn prepare(&self, inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        (0..self.others.len()).try_for_each(|i| self.sparse(inputs, i).map(|_| ()))
    }

    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let (dtype, cols) = (self.dtype, inputs[self.base].cols());
        inputs[self.base].read_rows(rows.clone(), out)?;
        let mut weighted = Vec::new(); // [models][values of these rows]
        for (i, &m) in self.others.iter().enumerate() {
            let mut p = Block::new(out.len());
            elementwise::subtract(&read(&inputs[m], rows.clone())?, out, dtype, &mut p);
            self.sparse(inputs, i)?.apply(rows.start * cols, cols, dtype, &mut p);
            elementwise::scale(&mut p, self.weights[i], dtype);
            weighted.push(p);
        }
        let mut merged = match self.consensus {
            true => self.vote(&weighted, out.len()),
            false => self.sum(&weighted, out.len()),
        };
        if self.lambda != 1.0 {
            elementwise::scale(&mut merged, self.lambda, dtype);
        }
        elementwise::add(out, &merged);
        elementwise::round(out, dtype);
        Ok(())
    }
}

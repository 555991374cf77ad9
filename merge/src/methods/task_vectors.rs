//! What the methods on differences to a base (task vectors) have in common.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};

use super::gram::subtract;
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

    /// `base + lambda sum / divisor`.
    fn finish(&self, base: f32, sum: f32, divisor: f32) -> f32 {
        let mut d = sum;
        if self.normalize {
            d = round(d / divisor, self.dtype);
        }
        if self.lambda != 1.0 {
            d = round(d * self.lambda, self.dtype);
        }
        round(base + d, self.dtype)
    }

    /// Sums everything. `out` holds the base, `weighted` the weighted task vectors.
    fn sum(&self, weighted: &[Vec<f32>], out: &mut [f32]) {
        let total: f32 = self.weights.iter().sum();
        let divisor = if total.abs() < 1e-8 { 1.0 } else { round(total, self.dtype) };
        for (i, o) in out.iter_mut().enumerate() {
            let sum: f32 = weighted.iter().map(|p| p[i]).sum();
            *o = self.finish(*o, round(sum, self.dtype), divisor);
        }
    }

    /// Sums what has the sign of the sum of all.
    fn vote(&self, weighted: &[Vec<f32>], out: &mut [f32]) {
        for (i, o) in out.iter_mut().enumerate() {
            let all: f32 = weighted.iter().map(|p| p[i]).sum();
            let positive = round(all, self.dtype) >= 0.0;
            let (mut sum, mut divisor) = (0f32, 0f32);
            for (weight, p) in self.weights.iter().zip(weighted) {
                if p[i] != 0.0 && (p[i] > 0.0) == positive {
                    sum += p[i];
                    divisor += weight;
                }
            }
            let divisor = match round(divisor, self.dtype) {
                0.0 => 1.0,
                divisor => divisor,
            };
            *o = self.finish(*o, round(sum, self.dtype), divisor);
        }
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
        let mut weighted = vec![Vec::new(); self.others.len()]; // [models][values of these rows]
        for (i, p) in weighted.iter_mut().enumerate() {
            subtract(&read(&inputs[self.others[i]], rows.clone())?, out, dtype, p);
            self.sparse(inputs, i)?.apply(rows.start * cols, cols, dtype, p);
            let weight = self.weights[i];
            p.iter_mut().for_each(|v| *v = round(weight * *v, dtype));
        }
        match self.consensus {
            true => self.vote(&weighted, out),
            false => self.sum(&weighted, out),
        }
        Ok(())
    }
}

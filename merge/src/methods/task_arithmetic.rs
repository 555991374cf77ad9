//! `task_arithmetic`: base plus weighted differences.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};

use super::{Base, Combine, Group, Method, Parameter, Scope, flag, number, read, round};

/// `B + lambda sum_m w_m (W_m - B)`, divided by `sum_m w_m` with `normalize`. Rounded to the dtype of the arithmetic after
/// each step.
pub(super) const METHOD: Method = Method {
    name: "task_arithmetic",
    summary: "the base plus weighted differences of the others to it",
    parameters: &parameters(false),
    base: Base::Required,
    models: (1, usize::MAX),
    whole_tensor: false,
    source: "Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089",
    build,
};

/// The parameters of the family of task-vector methods: the first two belong to models.
pub(super) const fn parameters(normalize: bool) -> [Parameter; 6] {
    [
        number("weight", Scope::Model, None, "weight of this model's difference"),
        number("density", Scope::Model, Some(1.0), "share of the difference that is kept"),
        flag("normalize", normalize, "divide by the sum of the weights"),
        number("lambda", Scope::Global, Some(1.0), "factor on the merged difference"),
        flag("rescale", false, "restore the sum of absolute differences after sparsifying"),
        flag("int8_mask", false, "accepted; changes no number"),
    ]
}

/// What the family has in common.
#[derive(Debug)]
pub(super) struct Common {
    /// Which input is the base.
    pub base: usize,
    /// Weight per input, rounded to the dtype of the arithmetic; that of the base is not used.
    pub weights: Vec<f32>,
    /// Divide by the sum of the weights.
    pub normalize: bool,
    /// Factor on the merged difference.
    pub lambda: f32,
    /// Dtype of the arithmetic.
    pub dtype: Dtype,
}

impl Common {
    pub fn new(group: &Group) -> Result<Self, String> {
        Ok(Self {
            base: group.base.ok_or("the base is not among the models")?,
            weights: group.own(0).into_iter().map(|w| round(w as f32, group.dtype)).collect(),
            normalize: group.global[0] != 0.0,
            lambda: group.global[1] as f32,
            dtype: group.dtype,
        })
    }

    /// The inputs that are not the base.
    pub fn others(&self, inputs: &[WeightRef]) -> impl Iterator<Item = usize> + use<> {
        let base = self.base;
        (0..inputs.len()).filter(move |m| *m != base)
    }

    /// `base + lambda difference / divisor`.
    pub fn finish(&self, base: f32, difference: f32, divisor: f32) -> f32 {
        let mut d = difference;
        if self.normalize {
            d = round(d / divisor, self.dtype);
        }
        if self.lambda != 1.0 {
            d = round(d * self.lambda, self.dtype);
        }
        round(base + d, self.dtype)
    }
}

#[derive(Debug)]
struct TaskArithmetic(Common);

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Ok(Box::new(TaskArithmetic(Common::new(group)?)))
}

impl Combine for TaskArithmetic {
    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let (common, dtype) = (&self.0, self.0.dtype);
        let base = read(&inputs[common.base], rows.clone())?;
        out.fill(0.0);
        let mut total = 0f32;
        for m in common.others(inputs) {
            let weight = common.weights[m];
            total += weight;
            let model = read(&inputs[m], rows.clone())?;
            for ((o, w), b) in out.iter_mut().zip(model).zip(&base) {
                *o += round(weight * round(w - b, dtype), dtype);
            }
        }
        let divisor = if total.abs() < 1e-8 { 1.0 } else { round(total, dtype) };
        for (o, b) in out.iter_mut().zip(base) {
            *o = common.finish(b, round(*o, dtype), divisor);
        }
        Ok(())
    }
}

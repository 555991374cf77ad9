//! `linear`: weighted mean.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};
use moe_merge_kernels::elementwise;

use super::{Base, Combine, Group, Method, Scope, flag, number, read};

/// `sum_m w_m W_m`, divided by `sum_m w_m` with `normalize`. In f32, rounded once.
pub(super) const METHOD: Method = Method {
    name: "linear",
    summary: "weighted mean of the models",
    formula: "sum w W, divided by sum w with `normalize`",
    parameters: &[
        number("weight", Scope::Model, None, "weight of this model"),
        flag("normalize", true, "divide by the sum of the weights"),
    ],
    base: Base::Ordinary,
    models: (1, usize::MAX),
    whole_tensor: false,
    activations: None,
    source: "Wortsman et al. 2022, Model soups, arXiv:2203.05482",
    build,
};

#[derive(Debug)]
struct Linear {
    /// One for each input.
    weights: Vec<f32>,
    /// Sum of the weights, 1 without `normalize`.
    divisor: f32,
    dtype: Dtype,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let weights: Vec<f32> = group.own(0).into_iter().map(|w| w as f32).collect();
    let divisor = if group.global[0] != 0.0 { weights.iter().sum() } else { 1.0 };
    if divisor == 0.0 {
        return Err("the weights add up to zero, and `normalize` divides by their sum".into());
    }
    Ok(Box::new(Linear { weights, divisor, dtype: group.dtype }))
}

/// The mean of the inputs beside the base, by the first of their parameters.
pub(super) fn mean(group: &Group) -> Result<Box<dyn Combine>, String> {
    let mut weights = vec![0.0; group.inputs.len()];
    group.others().into_iter().for_each(|m| weights[m] = group.own[m][0] as f32);
    let divisor: f32 = weights.iter().sum();
    if divisor == 0.0 {
        return Err("the weights add up to zero".into());
    }
    Ok(Box::new(Linear { weights, divisor, dtype: group.dtype }))
}

impl Combine for Linear {
    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        out.fill(0.0);
        for (input, weight) in inputs.iter().zip(&self.weights).filter(|(_, w)| **w != 0.0) {
            elementwise::add_scaled(out, *weight, &read(input, rows.clone())?);
        }
        if self.divisor != 1.0 {
            elementwise::divide(out, self.divisor);
        }
        elementwise::round(out, self.dtype);
        Ok(())
    }
}

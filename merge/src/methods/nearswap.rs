//! `nearswap`: swaps in what is near.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};
use moe_merge_kernels::elementwise;

use super::scan::Block;
use super::{Base, Combine, Group, Method, Scope, number, read};

/// `w W + (1-w) B`, `w = clamp(t / max(|B - W|, 1e-6), 0, 1)` for each number. Rounded to the dtype of the arithmetic after
/// each step.
pub(super) const METHOD: Method = Method {
    name: "nearswap",
    summary: "the base with the numbers of one other model where they are near",
    formula: "w W + (1-w) B with w = clamp(t/max(|B - W|, 1e-6), 0, 1) for each number",
    parameters: &[number("t", Scope::Global, None, "differences up to this are taken over whole")
        .within(0.0, f64::INFINITY)],
    base: Base::Required,
    models: (1, 1),
    whole_tensor: false,
    activations: None,
    source: "mergekit `merge_methods/nearswap.py`, by alchemonaut",
    build,
};

#[derive(Debug)]
struct NearSwap {
    base: usize,
    t: f32,
    dtype: Dtype,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let (base, t, dtype) = (group.required_base()?, group.global[0] as f32, group.dtype);
    Ok(Box::new(NearSwap { base, t, dtype }))
}

impl Combine for NearSwap {
    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let dtype = self.dtype;
        inputs[self.base].read_rows(rows.clone(), out)?;
        let mut other = read(&inputs[1 - self.base], rows)?;
        let mut weight = Block::new(out.len());
        let each = weight.iter_mut().zip(out.iter()).zip(other.iter());
        each.for_each(|((d, o), v)| *d = (o - v).abs());
        elementwise::round(&mut weight, dtype);
        weight.iter_mut().for_each(|w| *w = self.t / w.max(1e-6));
        elementwise::round(&mut weight, dtype);
        weight.iter_mut().for_each(|w| *w = w.clamp(0.0, 1.0));
        other.iter_mut().zip(weight.iter()).for_each(|(v, w)| *v *= w);
        elementwise::round(&mut other, dtype);
        weight.iter_mut().for_each(|w| *w = 1.0 - *w);
        elementwise::round(&mut weight, dtype);
        out.iter_mut().zip(weight.iter()).for_each(|(o, w)| *o *= w);
        elementwise::round(out, dtype);
        elementwise::add(out, &other);
        elementwise::round(out, dtype);
        Ok(())
    }
}

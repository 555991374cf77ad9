//! `passthrough`: one model as it is, or scaled.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};
use moe_merge_kernels::elementwise;

use super::{Base, Combine, Group, Method, Scope, number};

/// `scale W`; without `scale` the very bytes.
pub(super) const METHOD: Method = Method {
    name: "passthrough",
    summary: "layers of one model after another, as they are",
    formula: "scale W",
    parameters: &[number("scale", Scope::Model, Some(1.0), "factor on the tensor")],
    base: Base::Ordinary,
    models: (1, 1),
    whole_tensor: false,
    activations: None,
    source: "mergekit `merge_methods/passthrough.py`",
    build,
};

/// Whether the result is its only input.
pub(super) fn is_copy(method: &Method, group: &Group) -> bool {
    *method == METHOD && group.own(0) == [1.0]
}

#[derive(Debug)]
struct Scaled {
    scale: f32,
    dtype: Dtype,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Ok(Box::new(Scaled { scale: group.own(0)[0] as f32, dtype: group.dtype }))
}

impl Combine for Scaled {
    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        inputs[0].read_rows(rows, out)?;
        elementwise::scale(out, self.scale, self.dtype);
        Ok(())
    }
}

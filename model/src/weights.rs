//! Tensors of a source, checked and ready for use.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_merge_checkpoint::weight::{OwnedWeight, RowSlice};
use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_kernels::Exec;

use crate::error::ModelError;
use crate::ops::FrozenLinear;
use crate::spec::Spec;

/// Tensors by Hub name, with the shapes that a spec expects.
pub(crate) struct Weights {
    source: Source,
    expected: BTreeMap<String, Vec<usize>>,
    /// How products with them are computed.
    pub exec: Exec,
}

impl Weights {
    /// Products with them are exact.
    pub fn new(source: &Source, spec: &Spec) -> Result<Self, ModelError> {
        Ok(Self {
            source: source.clone(),
            expected: spec.expected_tensors().into_iter().collect(),
            exec: Exec::default(),
        })
    }

    /// The same, with products as `exec` says.
    pub fn computed(self, exec: Exec) -> Self {
        Self { exec, ..self }
    }

    /// A linear layer of `weight`.
    pub fn frozen(&self, weight: WeightRef, bias: Option<Arc<[f32]>>) -> FrozenLinear {
        FrozenLinear::new(weight, bias, self.exec)
    }

    /// Whether the spec expects a tensor of this name.
    pub fn expects(&self, name: &str) -> bool {
        self.expected.contains_key(name)
    }

    /// A tensor of the shape expected; its numbers may have to be computed whenever they are read.
    pub fn stored(&self, name: &str) -> Result<WeightRef, ModelError> {
        let weight = self.source.weight(name)?;
        if let Some(shape) = self.expected.get(name) {
            weight.expect_shape(shape, "from the sizes in the configuration")?;
        }
        Ok(weight.clone())
    }

    /// As [`Weights::stored`], with bytes; a tensor that is computed is computed here, once.
    pub fn get(&self, name: &str) -> Result<WeightRef, ModelError> {
        let weight = self.stored(name)?;
        if weight.bytes().is_some() {
            return Ok(weight);
        }
        Ok(Arc::new(OwnedWeight::materialise(&*weight)?))
    }

    /// A small tensor as f32 numbers.
    pub fn vector(&self, name: &str) -> Result<Arc<[f32]>, ModelError> {
        Ok(self.get(name)?.to_f32()?.into())
    }

    /// `MODULE.weight`, and `MODULE.bias` where the spec expects one.
    pub fn linear(&self, module: &str) -> Result<FrozenLinear, ModelError> {
        let bias = format!("{module}.bias");
        let bias = if self.expects(&bias) { Some(self.vector(&bias)?) } else { None };
        Ok(self.frozen(self.get(&format!("{module}.weight"))?, bias))
    }

    /// `MODULE.weight` (and bias) cut into linear layers of so many rows each.
    pub fn cut<const N: usize>(
        &self,
        module: &str,
        rows: [usize; N],
    ) -> Result<[FrozenLinear; N], ModelError> {
        let weight = self.get(&format!("{module}.weight"))?;
        let bias = format!("{module}.bias");
        let bias = if self.expects(&bias) { Some(self.vector(&bias)?) } else { None };
        let mut from = 0;
        Ok(rows.map(|rows| {
            let range = from..from + rows;
            from += rows;
            let bias = bias.as_ref().map(|b| b[range.clone()].into());
            self.frozen(Arc::new(RowSlice::new(weight.clone(), range)), bias)
        }))
    }

    /// Puts `weight` in the place of the tensor `name`.
    pub fn replace(&mut self, name: String, weight: WeightRef) {
        self.source.tensors.insert(name, weight);
    }

    /// Lets the pages of all tensors below `prefix` leave memory.
    pub fn release(&self, prefix: &str) {
        for (_, weight) in self
            .source
            .tensors
            .range(prefix.to_owned()..)
            .take_while(|(n, _)| n.starts_with(prefix))
        {
            weight.release();
        }
    }
}

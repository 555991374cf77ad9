//! One expert of a layer apart from everything else in it.

use candle_core::Tensor;

use super::{Feed, Layer, add, add_shared};
use crate::error::ModelError;
use crate::ops::Expert;
use crate::spec::Spec;

impl Layer {
    /// The matrices of routed expert `expert`, or of the MLP of a dense layer, and the factor on what they add to the stream
    /// when a router is certain of them.
    pub fn mlp_of(&self, spec: &Spec, expert: usize) -> Option<(&Expert, f32)> {
        match &self.mlp {
            Feed::Dense(mlp) => Some((mlp, spec.residual_scale)),
            Feed::Moe(moe) => {
                Some((moe.experts.get(expert)?, spec.residual_scale * moe.spec.router.scale))
            }
        }
    }

    /// The stream after the layer if its routed experts gave nothing, from what [`Layer::attended`] gave.
    ///
    /// # Errors
    /// [`ModelError::Transplant`] for a layer with a norm behind its MLP: there an expert adds nothing on its own.
    pub fn without_experts(
        &self,
        spec: &Spec,
        x: &Tensor,
        mlp_input: &Tensor,
    ) -> Result<Tensor, ModelError> {
        if self.after.is_some() {
            return Err(ModelError::Transplant {
                what: format!("experts of `{}` cannot be fitted to its stream", spec.family),
                expected: "MLPs that add to the stream as they are".into(),
                found: "a norm behind each of them".into(),
            });
        }
        match &self.mlp {
            Feed::Moe(moe) if moe.shared.is_some() => {
                let nothing = mlp_input.zeros_like()?;
                let out = add_shared(nothing, moe, spec.activation, mlp_input)?;
                add(spec, x, &out, None)
            }
            _ => Ok(x.clone()),
        }
    }

    /// The gradient of [`Layer::without_experts`] with respect to `mlp_input`, added to `d_input`; that with respect to the stream
    /// after attention is `d` itself.
    pub fn without_experts_back(
        &self,
        spec: &Spec,
        mlp_input: &Tensor,
        d: &[f32],
        d_input: &mut [f32],
    ) -> Result<(), ModelError> {
        let trail = self.shared_trail(spec.activation, mlp_input)?;
        self.shared_back(spec, trail, mlp_input, d, d_input)
    }
}

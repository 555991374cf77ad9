//! One expert of a layer apart from everything else in it.

use std::sync::Arc;

use candle_core::Tensor;
use moe_merge_kernels::{Routing, route_backward};

use super::{Feed, Gating, Layer, Moe, OtherRouter, add, add_shared};
use crate::error::ModelError;
use crate::ops::{Expert, RouterLogits, numbers};
use crate::spec::Spec;

/// Who is visited, and why.
pub(crate) struct Choice {
    pub routing: Arc<Routing>,
    /// `[tokens, experts]`
    pub logits: Tensor,
}

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

    /// The experts that a router with the weights `rows [experts, hidden]` chooses, and the logits it chooses by.
    ///
    /// # Errors
    /// As [`Layer::forward`]; a dense layer has nobody to choose from.
    pub fn chosen(&self, mlp_input: &Tensor, rows: &Tensor) -> Result<Choice, ModelError> {
        let moe = self.moe()?;
        let other = OtherRouter { weights: rows, top_k: moe.spec.router.top_k };
        let (routing, logits) = self.choice(moe, mlp_input, Gating::Weights(other))?;
        let logits = logits.ok_or_else(|| candle_core::Error::msg("a router without logits"))?;
        Ok(Choice { routing, logits })
    }

    /// From the gradient `d_weights [tokens, top_k]` of the weights of [`Layer::chosen`] to that of `rows`; what reaches
    /// `mlp_input` is added to `d_input`.
    pub fn chosen_back(
        &self,
        choice: &Choice,
        (mlp_input, rows): (&[f32], &Tensor),
        d_weights: &[f32],
        d_input: Option<&mut [f32]>,
    ) -> Result<Vec<f32>, ModelError> {
        let (logits, rule) = (numbers(&choice.logits)?, &self.moe()?.spec.router);
        let mut d = vec![0.0; logits.len()];
        route_backward(&logits, rows.dim(0)?, &choice.routing, d_weights, rule, &mut d)?;
        let found = RouterLogits.back(mlp_input, rows, &d, d_input, true)?;
        Ok(found.unwrap_or_default())
    }

    fn moe(&self) -> Result<&Moe, ModelError> {
        match &self.mlp {
            Feed::Moe(moe) => Ok(moe),
            Feed::Dense(_) => Err(candle_core::Error::msg("a dense layer has no router").into()),
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

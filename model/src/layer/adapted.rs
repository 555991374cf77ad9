//! A layer with factors beside the matrices of its MLP, or of one of its experts.

use candle_core::Tensor;
use moe_merge_kernels::{Activation, RopeTable, RouterSpec};

use super::{Fed, Feed, Gating, Layer, OtherRouter, Passed, Past, add, add_shared, forced, given};
use crate::error::ModelError;
use crate::lora::{ExpertFactors, LoraFactors};
use crate::ops::{Expert, Experts, FrozenLinear, Gate, RouterLogits, apply2};
use crate::spec::Spec;

/// What stands beside the weights of a layer.
#[derive(Clone, Copy)]
pub(crate) struct Adapted<'a> {
    /// Factors; in a dense layer the number of their expert says nothing.
    pub factors: &'a ExpertFactors,
    /// Output of the routed experts for the same input, weights and factors, where an earlier pass has computed it.
    pub known: Option<&'a Tensor>,
}

impl Layer {
    /// As [`Layer::forward_gated`], with factors beside the MLP, or beside one of its experts. Gradients flow to those
    /// that are variables.
    pub fn forward_adapted(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
        gating: Gating<'_>,
        adapted: Adapted<'_>,
    ) -> Result<Passed, ModelError> {
        let (x, mlp_input) = self.attended(spec, x, table, past)?;
        let Fed { out, routing, logits, routed } =
            self.feed_adapted(spec.activation, &mlp_input, gating, adapted)?;
        let stream = add(spec, &x, out, self.after.as_ref().map(|a| &a[1]))?;
        Ok(Passed { stream, mlp_input, routing, logits, routed })
    }

    fn feed_adapted(
        &self,
        activation: Activation,
        x: &Tensor,
        gating: Gating<'_>,
        adapted: Adapted<'_>,
    ) -> Result<Fed, ModelError> {
        let moe = match &self.mlp {
            Feed::Dense(mlp) => {
                let out = dense(mlp, activation, x, adapted.factors)?;
                return Ok(Fed { out, routing: None, logits: None, routed: None });
            }
            Feed::Moe(moe) => moe,
        };
        let (routing, weights, logits) = match gating {
            Gating::Stored => self.routed(moe, moe.router.forward(x)?, moe.spec.router, None)?,
            Gating::Always(e) => {
                self.routed(moe, moe.router.forward(x)?, moe.spec.router, Some(e))?
            }
            Gating::Weights(OtherRouter { weights, top_k, .. }) => {
                let rule = RouterSpec { top_k, ..moe.spec.router };
                self.routed(moe, apply2(x, weights, RouterLogits)?, rule, None)?
            }
            Gating::Forced(ids) => forced(ids, moe.spec.router.scale)?,
            Gating::Given(routing) => given(routing.clone())?,
        };
        let experts = Experts {
            routing: routing.clone(),
            experts: moe.experts.clone(),
            activation,
            known: adapted.known.cloned(),
            placed: None,
        };
        let routed = experts.with_lora(x, &weights, adapted.factors)?;
        let out = add_shared(routed.clone(), moe, activation, x)?;
        let routing = Some(std::sync::Arc::unwrap_or_clone(routing));
        Ok(Fed { out, routing, logits, routed: Some(routed) })
    }
}

fn dense(
    mlp: &Expert,
    activation: Activation,
    x: &Tensor,
    factors: &ExpertFactors,
) -> candle_core::Result<Tensor> {
    let gate = linear(&mlp.gate, x, factors.gate.as_ref())?;
    let up = linear(&mlp.up, x, factors.up.as_ref())?;
    linear(&mlp.down, &apply2(&gate, &up, Gate(activation))?, factors.down.as_ref())
}

fn linear(
    layer: &FrozenLinear,
    x: &Tensor,
    factors: Option<&LoraFactors>,
) -> candle_core::Result<Tensor> {
    match factors {
        Some(factors) => layer.clone().with_lora(x, factors),
        None => layer.forward(x),
    }
}

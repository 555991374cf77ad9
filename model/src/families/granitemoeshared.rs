//! Granite MoE with a shared MLP: llama attention, all experts in one tensor, four multipliers.

use super::keys::{Keys, set_biases};
use crate::error::ModelError;
use crate::spec::{ExpertNames, Mlp, SharedExpert, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = keys.llama("granitemoeshared", 10_000.0)?;
    let bias = keys.bool_or("attention_bias", false)?;
    set_biases(&mut spec, bias, bias);
    spec.embedding_scale = keys.number_or("embedding_multiplier", 1.0)? as f32;
    spec.residual_scale = keys.number_or("residual_multiplier", 1.0)? as f32;
    spec.logits_divisor = keys.number_or("logits_scaling", 1.0)? as f32;
    spec.attention.scale = keys.number_or("attention_multiplier", 1.0)? as f32;
    let mut moe = keys.experts(ExpertNames::Granite, keys.size("intermediate_size")?, true)?;
    let shared = keys.size_or("shared_intermediate_size", 0)?;
    moe.shared = (shared > 0).then_some(SharedExpert {
        module: "shared_mlp",
        inter: shared,
        gate: None,
        bias: false,
        fused: true,
    });
    for layer in &mut spec.layers {
        layer.mlp = Mlp::Moe(moe.clone());
    }
    Ok(spec)
}

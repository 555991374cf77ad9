//! OLMoE: experts in every layer, norms over all query and all key heads together.

use super::keys::{Keys, set_biases, set_qk_norm};
use crate::error::ModelError;
use crate::spec::{AttentionKind, ExpertNames, Mlp, QkNorm, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = keys.llama("olmoe", 10_000.0)?;
    let bias = keys.bool_or("attention_bias", false)?;
    set_biases(&mut spec, bias, bias);
    set_qk_norm(&mut spec, QkNorm::Full);
    let limit = keys.number("clip_qkv")?;
    if let AttentionKind::Projected { clip, .. } = &mut spec.attention.kind {
        *clip = limit;
    }
    let renormalise = keys.bool_or("norm_topk_prob", false)?;
    let moe = keys.experts(ExpertNames::Qwen, keys.size("intermediate_size")?, renormalise)?;
    for layer in &mut spec.layers {
        layer.mlp = Mlp::Moe(moe.clone());
    }
    Ok(spec)
}

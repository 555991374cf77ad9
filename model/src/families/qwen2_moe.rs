//! Qwen 2 MoE: routed experts and one shared expert with a gate.

use super::keys::{Keys, set_biases};
use super::qwen2::windowed;
use crate::error::ModelError;
use crate::spec::{ExpertNames, Mlp, MoeMlp, SharedExpert, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = windowed(keys, "qwen2_moe")?;
    set_biases(&mut spec, keys.bool_or("qkv_bias", true)?, false);
    let renormalise = keys.bool_or("norm_topk_prob", false)?;
    let mut moe =
        keys.experts(ExpertNames::Qwen, keys.size("moe_intermediate_size")?, renormalise)?;
    moe.shared = Some(SharedExpert {
        module: "mlp.shared_expert",
        inter: keys.size("shared_expert_intermediate_size")?,
        gate: Some("mlp.shared_expert_gate"),
        bias: false,
        fused: false,
    });
    sparse_layers(keys, &mut spec, &moe)?;
    Ok(spec)
}

/// Puts experts where `decoder_sparse_step` and `mlp_only_layers` want them.
pub(super) fn sparse_layers(
    keys: &Keys<'_>,
    spec: &mut Spec,
    moe: &MoeMlp,
) -> Result<(), ModelError> {
    let step = keys.size_or("decoder_sparse_step", 1)?;
    let dense = keys.layer_list("mlp_only_layers")?;
    for (l, layer) in spec.layers.iter_mut().enumerate() {
        if step > 0 && (l + 1).is_multiple_of(step) && !dense.contains(&l) {
            layer.mlp = Mlp::Moe(moe.clone());
        }
    }
    Ok(())
}

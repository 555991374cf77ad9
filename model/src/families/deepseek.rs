//! DeepSeek MoE, the first one: llama attention, routed experts and ungated shared ones. mergekit writes it.

use moe_merge_kernels::{Precision, RouterSpec};

use super::keys::{Keys, set_biases};
use crate::error::ModelError;
use crate::spec::{ExpertNames, Mlp, MoeMlp, SharedExpert, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = keys.llama("deepseek", 10_000.0)?;
    let bias = keys.bool_or("attention_bias", false)?;
    set_biases(&mut spec, bias, bias);
    let mut moe = experts(keys)?;
    if let Some(shared) = &mut moe.shared {
        shared.bias = false;
    }
    sparse_layers(keys, &mut spec, &moe)?;
    Ok(spec)
}

/// Routed and shared experts as DeepSeek's keys describe them.
pub(super) fn experts(keys: &Keys<'_>) -> Result<MoeMlp, ModelError> {
    let inter = keys.size("moe_intermediate_size")?;
    let shared = keys.size_or("n_shared_experts", 0)?;
    if keys.has("scoring_func") && keys.text("scoring_func") != Some("softmax") {
        return Err(keys.refuse("scoring_func", "softmax"));
    }
    Ok(MoeMlp {
        experts: keys.size("n_routed_experts")?,
        inter,
        router: RouterSpec {
            renormalise: keys.bool_or("norm_topk_prob", false)?,
            ..RouterSpec::softmax(keys.size("num_experts_per_tok")?)
        },
        reference_precision: Precision::RoundLikeHf { logits: true, weights: false },
        selection_bias: None,
        names: ExpertNames::Qwen,
        shared: (shared > 0).then(|| SharedExpert {
            module: "mlp.shared_experts",
            inter: inter * shared,
            gate: None,
            bias: false,
            fused: false,
        }),
    })
}

/// Puts experts where `first_k_dense_replace` and `moe_layer_freq` want them.
pub(super) fn sparse_layers(
    keys: &Keys<'_>,
    spec: &mut Spec,
    moe: &MoeMlp,
) -> Result<(), ModelError> {
    let first = keys.size_or("first_k_dense_replace", 0)?;
    let step = keys.size_or("moe_layer_freq", 1)?.max(1);
    for (l, layer) in spec.layers.iter_mut().enumerate() {
        if l >= first && l.is_multiple_of(step) {
            layer.mlp = Mlp::Moe(moe.clone());
        }
    }
    Ok(())
}

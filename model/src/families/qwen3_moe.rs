//! Qwen 3 MoE: Qwen 3 attention, routed experts.

use super::keys::{Keys, set_biases, set_qk_norm};
use super::qwen2_moe::sparse_layers;
use crate::error::ModelError;
use crate::spec::{ExpertNames, QkNorm, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let on = keys.bool_or("use_sliding_window", false)?;
    let window = if on { keys.window()? } else { None };
    let mut spec = keys.llama_with_windows("qwen3_moe", 10_000.0, window, |_| true)?;
    let bias = keys.bool_or("attention_bias", false)?;
    set_biases(&mut spec, bias, bias);
    set_qk_norm(&mut spec, QkNorm::PerHead);
    let renormalise = keys.bool_or("norm_topk_prob", false)?;
    let moe = keys.experts(ExpertNames::Qwen, keys.size("moe_intermediate_size")?, renormalise)?;
    sparse_layers(keys, &mut spec, &moe)?;
    Ok(spec)
}

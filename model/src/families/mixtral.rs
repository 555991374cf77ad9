//! Mixtral: a mistral with experts in every layer, top-k weights always divided by their sum.

use moe_merge_kernels::Precision;

use super::keys::Keys;
use crate::error::ModelError;
use crate::spec::{ExpertNames, Mlp, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = keys.llama_with_windows("mixtral", 1_000_000.0, keys.window()?, |_| true)?;
    let mut moe = keys.experts(ExpertNames::Mixtral, keys.size("intermediate_size")?, true)?;
    moe.reference_precision = Precision::RoundLikeHf { logits: true, weights: false };
    for layer in &mut spec.layers {
        layer.mlp = Mlp::Moe(moe.clone());
    }
    Ok(spec)
}

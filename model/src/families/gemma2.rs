//! Gemma 2: norms around attention and MLP, softcaps, every other layer with a window.

use super::keys::{Keys, set_biases};
use crate::error::ModelError;
use crate::spec::Spec;

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = windowed(keys, "gemma2", |layer| layer.is_multiple_of(2))?;
    spec.attention.softcap = keys.number("attn_logit_softcapping")?;
    spec.final_softcap = keys.number("final_logit_softcapping")?;
    Ok(spec)
}

/// What Gemma 2 and 3 share.
pub(super) fn windowed(
    keys: &Keys<'_>,
    family: &'static str,
    sliding: impl Fn(usize) -> bool,
) -> Result<Spec, ModelError> {
    if keys.bool_or("use_bidirectional_attention", false)? {
        return Err(keys.refuse("use_bidirectional_attention", "false"));
    }
    let mut spec = keys.llama_with_windows(family, 10_000.0, keys.window()?, sliding)?;
    spec.norm_offset = 1.0;
    spec.sandwich = true;
    spec.embedding_scale = (spec.hidden as f32).sqrt();
    spec.tied = keys.bool_or("tie_word_embeddings", true)?;
    spec.attention.scale = 1.0 / (keys.number_or("query_pre_attn_scalar", 256.0)? as f32).sqrt();
    let key = if keys.has("hidden_activation") { "hidden_activation" } else { "hidden_act" };
    spec.activation =
        if keys.has(key) { keys.activation(key)? } else { moe_merge_kernels::Activation::GeluTanh };
    let bias = keys.bool_or("attention_bias", false)?;
    set_biases(&mut spec, bias, bias);
    Ok(spec)
}

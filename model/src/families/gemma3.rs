//! Gemma 3 (text): as Gemma 2, with norms on query and key heads, and frequencies of their own in layers with a window.

use super::gemma2::windowed;
use super::keys::{Keys, set_qk_norm};
use crate::error::ModelError;
use crate::spec::{QkNorm, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let key = if keys.has("sliding_window_pattern") {
        "sliding_window_pattern"
    } else {
        "_sliding_window_pattern"
    };
    let pattern = keys.size_or(key, 6)?.max(1);
    // Rotary frequencies differ by layer: they are read below, not by the plain llama.
    let mut spec = windowed(keys, "gemma3_text", |layer| !(layer + 1).is_multiple_of(pattern))?;
    let head_dim = spec.attention.qk_dim();
    let global = match keys.rope_for("full_attention", 1_000_000.0, head_dim)? {
        Some(rope) => rope,
        None => keys.rope(1_000_000.0, head_dim)?,
    };
    let local_theta = keys.number_or("rope_local_base_freq", 10_000.0)?;
    let local = match keys.rope_for("sliding_attention", local_theta, head_dim)? {
        Some(rope) => rope,
        None => moe_merge_kernels::RopeSpec {
            theta: local_theta,
            scaling: moe_merge_kernels::RopeScaling::None,
            ..global
        },
    };
    for layer in &mut spec.layers {
        layer.rope = if layer.window.is_some() { local } else { global };
    }
    set_qk_norm(&mut spec, QkNorm::PerHead);
    spec.attention.softcap = keys.number("attn_logit_softcapping")?;
    spec.final_softcap = keys.number("final_logit_softcapping")?;
    Ok(spec)
}

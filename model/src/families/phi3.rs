//! Phi 3: a llama whose q, k and v, and gate and up, are one tensor each.

use super::keys::Keys;
use crate::error::ModelError;
use crate::spec::{AttentionKind, Mlp, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = keys.llama_with_windows("phi3", 10_000.0, keys.window()?, |_| true)?;
    if let AttentionKind::Projected { fused, .. } = &mut spec.attention.kind {
        *fused = true;
    }
    for layer in &mut spec.layers {
        if let Mlp::Dense(mlp) = &mut layer.mlp {
            mlp.fused = true;
        }
    }
    Ok(spec)
}

//! Llama, and what calls itself so.

use super::keys::{Keys, set_biases};
use crate::error::ModelError;
use crate::spec::{Mlp, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = keys.llama("llama", 10_000.0)?;
    let bias = keys.bool_or("attention_bias", false)?;
    set_biases(&mut spec, bias, bias);
    let mlp_bias = keys.bool_or("mlp_bias", false)?;
    for layer in &mut spec.layers {
        if let Mlp::Dense(mlp) = &mut layer.mlp {
            mlp.bias = mlp_bias;
        }
    }
    Ok(spec)
}

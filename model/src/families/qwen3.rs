//! Qwen 3: a llama with norms on each query and key head.

use super::keys::{Keys, set_biases, set_qk_norm};
use super::qwen2::windowed;
use crate::error::ModelError;
use crate::spec::{QkNorm, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = windowed(keys, "qwen3")?;
    let bias = keys.bool_or("attention_bias", false)?;
    set_biases(&mut spec, bias, bias);
    set_qk_norm(&mut spec, QkNorm::PerHead);
    Ok(spec)
}

//! Qwen 2: a llama with biases on q, k and v.

use super::keys::{Keys, set_biases};
use crate::error::ModelError;
use crate::spec::Spec;

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = windowed(keys, "qwen2")?;
    set_biases(&mut spec, true, false);
    Ok(spec)
}

/// A llama whose layers from `max_window_layers` on have a window, if `use_sliding_window` says so.
pub(super) fn windowed(keys: &Keys<'_>, family: &'static str) -> Result<Spec, ModelError> {
    let on = keys.bool_or("use_sliding_window", false)?;
    let window = if on { keys.window()? } else { None };
    let from = keys.size_or("max_window_layers", 28)?;
    keys.llama_with_windows(family, 10_000.0, window, |layer| layer >= from)
}

//! Mistral: a llama with a sliding window.

use super::keys::Keys;
use crate::error::ModelError;
use crate::spec::Spec;

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    keys.llama_with_windows("mistral", 10_000.0, keys.window()?, |_| true)
}

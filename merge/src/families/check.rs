//! Whether the sources go together.

use std::collections::BTreeSet;

use moe_merge_checkpoint::{Source, WeightRef};
use serde_json::Value;

use super::{Dims, Matrix, Request, activation};
use crate::config_out::rope_parameters;
use crate::error::MergeError;

/// Name of an MLP matrix in a dense model.
pub fn dense_name(layer: usize, matrix: Matrix) -> String {
    format!("model.layers.{layer}.mlp.{}.weight", matrix.name())
}

/// Checks sizes, activation, biases and MLP tensors of every expert against the base.
///
/// # Errors
/// [`MergeError::Incompatible`] naming both sources; [`MergeError::Checkpoint`] if a configuration lacks a size.
pub fn check_sources(request: &Request<'_>) -> Result<Dims, MergeError> {
    let base = request.base;
    let dims = Dims::of(base)?;
    for expert in request.experts.iter().chain(&request.shared) {
        check_pair(base, &dims, expert)?;
    }
    check_mlps(base, base, &dims)?;
    Ok(dims)
}

fn check_pair(base: &Source, dims: &Dims, expert: &Source) -> Result<(), MergeError> {
    let differ = |what: &str, expected: String, found: String, hint: &str| {
        Err(MergeError::Incompatible {
            what: what.into(),
            first: base.label.clone(),
            second: expert.label.clone(),
            expected,
            found,
            hint: hint.into(),
            recipe: None,
        })
    };
    let (ours, theirs) = (base.config.model_type(), expert.config.model_type());
    if ours != theirs {
        return differ(
            "an expert is of another model type than the base",
            format!("model_type `{ours}`"),
            format!("model_type `{theirs}`"),
            "take experts that were fine-tuned from the base",
        );
    }
    let found = Dims::of(expert)?;
    let sizes = [
        ("hidden_size", dims.hidden, found.hidden),
        ("intermediate_size", dims.intermediate, found.intermediate),
        ("num_hidden_layers", dims.layers, found.layers),
        ("num_attention_heads", dims.heads, found.heads),
        ("num_key_value_heads", dims.kv_heads, found.kv_heads),
        ("head_dim", dims.head_dim, found.head_dim),
    ];
    if let Some((key, ours, theirs)) = sizes.into_iter().find(|(_, a, b)| a != b) {
        return differ(
            "an expert has another size than the base",
            format!("{key} {ours}"),
            format!("{key} {theirs}"),
            "all experts must share the sizes of `base_model`; `moe-merge inspect` lists them",
        );
    }
    if dims.vocab != found.vocab {
        return differ(
            "an expert has another vocabulary than the base",
            format!("vocab_size {}", dims.vocab),
            format!("vocab_size {}", found.vocab),
            "align the vocabularies first, with a dense recipe and `tokenizer_source: base`",
        );
    }
    let (ours, theirs) = (activation(&base.config), activation(&expert.config));
    if ours != theirs {
        return differ(
            "an expert has another activation than the base",
            format!("hidden_act `{ours}`"),
            format!("hidden_act `{theirs}`"),
            "take experts that were fine-tuned from the base",
        );
    }
    check_mlps(base, expert, dims)
}

/// Every MLP matrix is there, with the shape of the base, and without bias.
fn check_mlps(base: &Source, source: &Source, dims: &Dims) -> Result<(), MergeError> {
    for layer in 0..dims.layers {
        for matrix in Matrix::ALL {
            let name = dense_name(layer, matrix);
            mlp_weight(base, source, dims, layer, matrix)?;
            let bias = name.replace(".weight", ".bias");
            if source.tensors.contains_key(&bias) {
                return Err(MergeError::Incompatible {
                    what: "no output family has biases in its experts".into(),
                    first: base.label.clone(),
                    second: source.label.clone(),
                    expected: "an MLP without biases".into(),
                    found: format!("`{bias}`"),
                    hint: "use models without `mlp_bias`".into(),
                    recipe: None,
                });
            }
        }
    }
    Ok(())
}

/// One matrix of the MLP of a dense model, with its shape checked.
pub(crate) fn mlp_weight(
    base: &Source,
    source: &Source,
    dims: &Dims,
    layer: usize,
    matrix: Matrix,
) -> Result<WeightRef, MergeError> {
    let name = dense_name(layer, matrix);
    let shape = match matrix {
        Matrix::Gate | Matrix::Up => [dims.intermediate, dims.hidden],
        Matrix::Down => [dims.hidden, dims.intermediate],
    };
    let weight = source.weight(&name)?;
    let reason = match std::ptr::eq(base, source) {
        true => "intermediate_size and hidden_size of its config".to_owned(),
        false => format!("intermediate_size and hidden_size of the base `{}`", base.label),
    };
    weight.expect_shape(&shape, &reason)?;
    Ok(weight.clone())
}

/// What a person should know, though it stops nothing: other rotary settings of an expert, a window that is lost, tensors
/// that nobody uses.
pub fn warn_about_sources(request: &Request<'_>) -> Vec<String> {
    let base = request.base;
    let mut warnings = Vec::new();
    let (window, context) =
        (base.config.usize("sliding_window"), base.config.usize("max_position_embeddings"));
    let used = base.config.bool("use_sliding_window").unwrap_or(true);
    if let (Some(window), Some(context), true) = (window, context, used)
        && window < context
    {
        warnings.push(format!(
            "`{}` attends to the last {window} of {context} tokens; the output attends to all of them (sliding_window null)",
            base.label
        ));
    }
    let mut seen = BTreeSet::new();
    for expert in request.experts.iter().chain(&request.shared) {
        if expert.path == base.path || !seen.insert(expert.label.clone()) {
            continue;
        }
        let (ours, theirs) = (rope_parameters(&base.config), rope_parameters(&expert.config));
        if ours != theirs {
            warnings.push(format!(
                "`{}` was trained with other rotary settings than `{}` ({} against {}); the base's are used",
                expert.label,
                base.label,
                Value::Object(theirs),
                Value::Object(ours)
            ));
        }
        let known = |name: &str| {
            base.tensors.contains_key(name) || base.other.iter().any(|o| o.name == name)
        };
        let unknown =
            |name: &&String| !known(name) && name.as_str() != "lm_head.weight" && !is_derived(name);
        let unused: Vec<&String> = expert
            .tensors
            .keys()
            .chain(expert.other.iter().map(|o| &o.name))
            .filter(unknown)
            .collect();
        warnings.extend(unused_tensors(&expert.label, &unused));
    }
    warnings
}

/// Buffers that every loader computes for itself.
pub(crate) fn is_derived(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name.ends_with("attn.masked_bias")
}

/// One warning that names tensors which go nowhere.
pub(crate) fn unused_tensors(label: &str, names: &[&String]) -> Option<String> {
    const SHOWN: usize = 8;
    if names.is_empty() {
        return None;
    }
    let shown: Vec<String> = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect();
    let more = names.len().saturating_sub(SHOWN);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    Some(format!("`{label}` has tensors that nothing uses: {}{tail}", shown.join(", ")))
}

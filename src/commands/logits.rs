//! `logits PATH --tokens IDS --out FILE`: logits and hidden states, for parity checks.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

use moe_merge_checkpoint::CheckpointError;
use moe_merge_kernels::Exec;
use moe_merge_model::TextError;

use crate::args::{Common, LogitsArgs, RouterPrecision};
use crate::exit::Outcome;
use crate::render::{self, Failure};

/// Computes and writes them.
pub fn run(args: &LogitsArgs, common: &Common) -> Result<Outcome, Failure> {
    let source = super::open(&args.path, common)?;
    let mut model = super::device::open_model(&source, Exec::default(), None, common)?;
    if args.router_precision == RouterPrecision::LikeHf {
        model.round_routers_like_hf();
    }
    let spec = model.spec();
    let (tokens, vocab) = (args.tokens.as_slice(), spec.vocab);
    if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
        return Err(TextError::UnknownToken { token, vocab }.into());
    }
    if tokens.len() > spec.max_positions {
        return Err(TextError::TooLong {
            what: "list of tokens",
            context: spec.max_positions,
            found: tokens.len(),
            hint: "give fewer tokens".into(),
        }
        .into());
    }
    let (hidden, logits) = model.hidden_states(tokens)?;
    let mut tensors = BTreeMap::from([("logits".to_owned(), (vocab, le(&logits)))]);
    for (i, states) in hidden.iter().enumerate() {
        tensors.insert(format!("hidden_{i}"), (states.len() / tokens.len(), le(states)));
    }
    write(&args.out, tokens.len(), &tensors)?;
    let shapes: BTreeMap<&str, [usize; 2]> =
        tensors.iter().map(|(n, (width, _))| (n.as_str(), [tokens.len(), *width])).collect();
    if common.json {
        let out = args.out.display().to_string();
        render::json(&json!({"version": 1, "out": out, "tensors": shapes}))?;
    } else if !common.quiet {
        render::note(&format!("{} tensors written to `{}`", shapes.len(), args.out.display()));
    }
    Ok(Outcome::Done)
}

fn le(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Writes `[tokens, width]` tensors.
fn write(
    path: &Path,
    tokens: usize,
    tensors: &BTreeMap<String, (usize, Vec<u8>)>,
) -> Result<(), Failure> {
    let malformed = |found: String| CheckpointError::Malformed {
        what: "tensors cannot be written".into(),
        file: path.to_owned(),
        tensor: None,
        expected: "a safetensors file".into(),
        found,
        hint: None,
    };
    let mut views = Vec::new();
    for (name, (width, bytes)) in tensors {
        let view = TensorView::new(Dtype::F32, vec![tokens, *width], bytes)
            .map_err(|e| malformed(e.to_string()))?;
        views.push((name.as_str(), view));
    }
    let bytes = safetensors::serialize(views, None).map_err(|e| malformed(e.to_string()))?;
    super::write_beside(path, &bytes)
}

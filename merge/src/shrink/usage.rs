//! How much each expert is used by texts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moe_merge_checkpoint::{CheckpointError, Interrupt, Source};
use moe_merge_model::perplexity::DEFAULT_WINDOW;
use moe_merge_model::streamed::TokenText;
use moe_merge_model::trace::{TracedWindow, trace};
use moe_merge_model::{Placement, Spec, Tokenizer};

use crate::error::MergeError;

/// Share of the tokens' weight that goes to each expert, by layer: `[experts]`, of sum 1.
pub type Usage = BTreeMap<usize, Vec<f64>>;

/// Runs `texts` through the model.
///
/// # Errors
/// [`MergeError::Text`] for text that cannot be used, [`MergeError::Checkpoint`] for files that cannot be read, an
/// interruption.
pub fn usage(
    source: &Source,
    texts: &[PathBuf],
    placement: &Placement,
    interrupt: &Interrupt,
    progress: &mut dyn FnMut(usize),
) -> Result<Usage, MergeError> {
    let tokenizer = Tokenizer::from_source(source)?;
    let mut encoded = Vec::new();
    for path in texts {
        encoded.push((path.display().to_string(), tokenizer.encode(&read(path)?)?));
    }
    let texts: Vec<TokenText<'_>> =
        encoded.iter().map(|(origin, tokens)| TokenText { tokens, origin }).collect();
    let window = Spec::of(source)?.max_positions.min(DEFAULT_WINDOW);
    let mut sums = Usage::new();
    let mut visit = |seen: TracedWindow<'_>| {
        interrupt.check()?;
        let routing = seen.routing;
        let sum = sums.entry(seen.layer).or_insert_with(|| vec![0.0; seen.experts]);
        let chosen = routing.ids.chunks(routing.top_k).zip(routing.weights.chunks(routing.top_k));
        for (ids, weights) in chosen {
            let all: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            for (&id, &weight) in ids.iter().zip(weights) {
                let share =
                    if all > 0.0 { f64::from(weight) / all } else { 1.0 / ids.len() as f64 };
                sum[id as usize] += share;
            }
        }
        progress(routing.tokens);
        Ok(())
    };
    trace(source, &texts, tokenizer.bos(), window, placement, &mut visit)?;
    for sum in sums.values_mut() {
        let all: f64 = sum.iter().sum();
        sum.iter_mut().for_each(|s| *s /= all.max(f64::MIN_POSITIVE));
    }
    Ok(sums)
}

fn read(path: &Path) -> Result<String, MergeError> {
    let bytes = std::fs::read(path).map_err(|e| CheckpointError::io("reading", path, e))?;
    Ok(String::from_utf8(bytes).map_err(|e| CheckpointError::Malformed {
        what: "text is not UTF-8".into(),
        file: path.to_owned(),
        tensor: None,
        expected: "text in UTF-8".into(),
        found: format!("byte {} is not part of a character", e.utf8_error().valid_up_to()),
        hint: Some("convert it, for example with `iconv -t UTF-8`".into()),
    })?)
}

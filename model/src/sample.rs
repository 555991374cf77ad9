//! Texts that a model writes by itself, many at once.

use moe_merge_checkpoint::Source;
use rayon::prelude::*;

use crate::cache::LayerCache;
use crate::error::ModelError;
use crate::model::Model;
use crate::sampler::{Sampler, Sampling};
use crate::spec::Spec;
use crate::text_error::TextError;
use crate::tokenizer::Tokenizer;

/// Bytes of keys and values held at a time: more sequences wait until others are done.
const CACHES: usize = 128 << 20;

/// Sequences at a time at most: more make no product any faster.
const LANES: usize = 256;

/// Tokens of a prompt that start a text of its kind.
const START_TOKENS: usize = 4;

/// Beginnings for `count` texts of one kind: the first four tokens of each prompt in turn, after the token that begins a
/// text.
///
/// * `prompts`: with or without beginning-of-text token
/// * without prompts the beginning-of-text token alone; without one, a token that ends a text, which stands between texts
///   in training; `None` if there is neither
pub fn self_text_starts(
    prompts: &[Vec<u32>],
    tokenizer: &Tokenizer,
    count: usize,
) -> Option<Vec<Vec<u32>>> {
    let bos = tokenizer.bos();
    let mut starts: Vec<Vec<u32>> = Vec::new();
    for prompt in prompts {
        let own = prompt.strip_prefix(bos.as_slice()).unwrap_or(prompt);
        if !own.is_empty() {
            let own = own.iter().take(START_TOKENS).copied();
            starts.push(bos.into_iter().chain(own).collect());
        }
    }
    if starts.is_empty() {
        starts.push(vec![bos.or_else(|| tokenizer.eos_ids().first().copied())?]);
    }
    Some(starts.into_iter().cycle().take(count).collect())
}

/// Continues every one of `starts`, all of them together: a weight is read once for one token of each.
///
/// * `starts`: at least one token each, of any lengths
/// * `new_tokens`: tokens to write for each; a sequence also ends where the context is full
/// * `sampling`: sequence `i` draws from stream `i` of its seed, so that what one writes does not depend on the others
///   (but for the last bit of rounding, which depends on how many rows a product has)
/// * `eos`: tokens that end a sequence and are no part of it; none: it goes on
/// * `progress` is told how many tokens each step wrote; an error from it stops the work
/// * returns start and new tokens of each, in the order of `starts`; the same for any number of threads
///
/// Memory: weights that have to be computed, keys and values of 128 MB at most (one sequence at least), logits.
///
/// # Errors
/// [`TextError::EmptyText`] for a start without tokens, [`TextError::TooLong`] for one beyond the context,
/// [`TextError::Parameter`], and what opening and running the model can meet.
pub fn sample_texts(
    source: &Source,
    starts: &[Vec<u32>],
    new_tokens: usize,
    sampling: Sampling,
    eos: &[u32],
    progress: &mut dyn FnMut(usize) -> Result<(), ModelError>,
) -> Result<Vec<Vec<u32>>, TextError> {
    let model = Model::open(source)?;
    let lanes = lanes(model.spec(), starts, new_tokens, CACHES)?;
    run(&model, starts, new_tokens, sampling, eos, lanes, progress)
}

/// Checks the starts and says how many sequences go together, and how many tokens each of them has at most.
fn lanes(
    spec: &Spec,
    starts: &[Vec<u32>],
    new_tokens: usize,
    bytes: usize,
) -> Result<(usize, usize), TextError> {
    let context = spec.max_positions;
    for start in starts {
        if start.is_empty() {
            return Err(TextError::EmptyText {
                origin: "start of a text".into(),
                expected: "at least 1 token".into(),
                found: "0".into(),
            });
        }
        if start.len() > context {
            return Err(TextError::TooLong {
                what: "start of a text",
                context,
                found: start.len(),
                hint: "shorten it".into(),
            });
        }
    }
    let longest = starts.iter().map(Vec::len).max().unwrap_or(0);
    let capacity = longest.saturating_add(new_tokens).min(context);
    let a = &spec.attention;
    let token = 4 * a.kv_heads * (a.qk_dim() + a.v_dim()) * spec.layers.len();
    let most = bytes / token.saturating_mul(capacity).max(1);
    Ok((most.clamp(1, LANES).min(starts.len()), capacity))
}

/// A sequence under way.
struct Lane {
    /// Its place among the starts.
    number: usize,
    tokens: Vec<u32>,
    /// Tokens that have gone through the model.
    done: usize,
    /// Length at which it ends.
    end: usize,
    sampler: Sampler,
}

fn run(
    model: &Model,
    starts: &[Vec<u32>],
    new_tokens: usize,
    sampling: Sampling,
    eos: &[u32],
    (most, capacity): (usize, usize),
    progress: &mut dyn FnMut(usize) -> Result<(), ModelError>,
) -> Result<Vec<Vec<u32>>, TextError> {
    let mut texts = starts.to_vec();
    let mut lanes: Vec<Lane> = Vec::new();
    let mut caches: Vec<Vec<LayerCache>> = model.spec().layers.iter().map(|_| Vec::new()).collect();
    let mut waiting = starts.iter().enumerate();
    loop {
        while lanes.len() < most
            && let Some((number, start)) = waiting.next()
        {
            let end = start.len().saturating_add(new_tokens).min(capacity);
            if end == start.len() {
                continue;
            }
            let sampler = Sampler::numbered(sampling, number as u64)?;
            lanes.push(Lane { number, tokens: start.clone(), done: 0, end, sampler });
            for layer in caches.iter_mut().filter(|layer| layer.len() < lanes.len()) {
                layer.push(LayerCache::new(model, capacity));
            }
        }
        if lanes.is_empty() {
            return Ok(texts);
        }
        let written = step(model, &mut lanes, &mut caches, eos)?;
        progress(written)?;
        // Ended lanes leave; their caches move behind those in use and serve those that come.
        let mut at = 0;
        while at < lanes.len() {
            if lanes[at].tokens.len() < lanes[at].end {
                at += 1;
                continue;
            }
            let last = lanes.len() - 1;
            caches.iter_mut().for_each(|layer| layer.swap(at, last));
            let lane = lanes.swap_remove(at);
            texts[lane.number] = lane.tokens;
        }
    }
}

/// One token of every lane through the model; those whose start is behind them choose the next. Returns how many did.
fn step(
    model: &Model,
    lanes: &mut [Lane],
    caches: &mut [Vec<LayerCache>],
    eos: &[u32],
) -> Result<usize, TextError> {
    let tokens: Vec<u32> = lanes.iter().map(|l| l.tokens[l.done]).collect();
    let lens: Vec<usize> = lanes.iter().map(|l| l.done).collect();
    let ready = |l: &Lane| l.done + 1 == l.tokens.len();
    let rows: Vec<u32> = (0u32..).zip(&*lanes).filter(|(_, l)| ready(l)).map(|(i, _)| i).collect();
    let held: Vec<Vec<&mut LayerCache>> =
        caches.iter_mut().map(|layer| layer[..lanes.len()].iter_mut().collect()).collect();
    let logits = model.forward_lanes(&tokens, &lens, held, &rows, None)?;
    let choosing: Vec<&mut Lane> = lanes
        .iter_mut()
        .filter_map(|lane| {
            let chooses = ready(lane);
            lane.done += 1;
            chooses.then_some(lane)
        })
        .collect();
    let chosen = choosing
        .into_par_iter()
        .zip(logits.par_chunks_exact(model.spec().vocab))
        .map(|(lane, logits)| {
            let token = lane.sampler.next(logits)?;
            if eos.contains(&token) {
                lane.end = lane.tokens.len();
                return Ok(0);
            }
            lane.tokens.push(token);
            Ok(1)
        })
        .collect::<Result<Vec<usize>, TextError>>()?;
    Ok(chosen.into_iter().sum())
}

#[cfg(test)]
mod tests;

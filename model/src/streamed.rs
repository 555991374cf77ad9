//! Perplexity of long texts with one layer in memory at a time.

use std::time::{Duration, Instant};

use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_kernels::{Accuracy, Dtype, Exec, LogSumExp, MatView, Routing, linear};
use rayon::prelude::*;

use crate::error::ModelError;
use crate::layer::{Layer, Past, norm};
use crate::model::{Tables, check_length, embed};
use crate::ops::to_vec;
use crate::perplexity::{Perplexity, Window, Windows};
use crate::placement::Placement;
use crate::probe::{Batch, batch};
use crate::spec::Spec;
use crate::text_error::TextError;
use crate::weights::Weights;

/// A text whose tokens are known.
#[derive(Debug, Clone, Copy)]
pub struct TokenText<'a> {
    /// Its tokens, without beginning-of-text tokens.
    pub tokens: &'a [u32],
    /// Names it in messages.
    pub origin: &'a str,
}

/// What one window of a text did in one layer.
#[derive(Debug)]
pub struct WindowRouting<'a> {
    /// Number of the text.
    pub text: usize,
    /// Tokens at its beginning that are not the text's own: the beginning-of-text token.
    pub skip: usize,
    /// Routed experts in the layer.
    pub experts: usize,
    /// Where its tokens went.
    pub routing: &'a Routing,
}

/// Told what happens during a pass.
pub trait Watcher {
    /// Tokens went through all layers, or a share of them through one.
    fn advance(&mut self, tokens: usize);

    /// A window went through a MoE layer.
    fn routed(&mut self, window: WindowRouting<'_>);

    /// A token was scored; told in order.
    ///
    /// * `text`: number of the text
    /// * `position`: text tokens before it in its window
    /// * `nats`: `-ln p(token)`
    fn scored(&mut self, text: usize, position: usize, nats: f64) {
        let _ = (text, position, nats);
    }

    /// Asked before every layer; an error stops the pass.
    ///
    /// # Errors
    /// What stops it.
    fn go_on(&mut self) -> Result<(), ModelError>;
}

/// Bytes of hidden states held at a time; more text goes through the model in several passes.
const STATES: usize = 128 << 20;

/// Rows of the head and tokens that meet in one product.
pub(crate) const HEAD_ROWS: usize = 4096;
const HEAD_TOKENS: usize = 512;

/// Perplexity of the model in `source` on every text, as [`crate::perplexity::perplexity_of_tokens`] computes it, to
/// about 1e-6 of it.
///
/// Products run where `placement` says, each layer's weights being there while the texts go through it.
///
/// Memory: one layer, the hidden states of the windows (128 MB at most), a block of logits; weights that are computed are
/// computed layer by layer.
///
/// # Errors
/// As [`crate::perplexity::perplexity_of_tokens`] and [`crate::Model::open`].
pub fn perplexities(
    source: &Source,
    texts: &[TokenText<'_>],
    bos: Option<u32>,
    windows: Windows,
    watcher: &mut dyn Watcher,
    placement: &Placement,
) -> Result<Vec<Perplexity>, TextError> {
    let started = Instant::now();
    let spec = Spec::of(source)?;
    let weights = Weights::new(source, &spec)?;
    let mut sums = Vec::new();
    let mut pieces = Vec::new();
    for (text, t) in texts.iter().enumerate() {
        let cut = windows.cut_text(t.tokens.len(), usize::from(bos.is_some()), t.origin)?;
        let computed = cut.iter().map(|w| w.end - w.start + usize::from(bos.is_some())).sum();
        sums.push(Perplexity { tokens: 0, nats: 0.0, computed, time: Duration::ZERO });
        pieces.extend(cut.into_iter().map(|window| Piece { text, window }));
    }
    let mut from = 0;
    while from < pieces.len() {
        let (mut to, mut held) = (from, 0);
        while to < pieces.len() && (to == from || held < STATES) {
            held += 4 * spec.hidden * (pieces[to].window.end - pieces[to].window.start + 1);
            to += 1;
        }
        let run = Run { spec: &spec, weights: &weights, texts, bos, placement };
        pass(&run, &pieces[from..to], watcher, &mut sums)?;
        from = to;
    }
    let time = started.elapsed() / sums.len().max(1) as u32;
    sums.iter_mut().for_each(|s| s.time = time);
    Ok(sums)
}

struct Piece {
    text: usize,
    window: Window,
}

/// What every pass of a run has in common.
#[derive(Clone, Copy)]
struct Run<'a> {
    spec: &'a Spec,
    weights: &'a Weights,
    texts: &'a [TokenText<'a>],
    bos: Option<u32>,
    placement: &'a Placement,
}

fn pass(
    run: &Run<'_>,
    pieces: &[Piece],
    watcher: &mut dyn Watcher,
    sums: &mut [Perplexity],
) -> Result<(), TextError> {
    let Run { spec, weights, texts, bos, placement } = *run;
    let prompts: Vec<Vec<u32>> = pieces
        .iter()
        .map(|p| {
            let text = &texts[p.text].tokens[p.window.start..p.window.end];
            bos.into_iter().chain(text.iter().copied()).collect()
        })
        .collect();
    for prompt in &prompts {
        check_length(spec, prompt.len())?;
    }
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let mut batches = {
        let embedding = weights.stored("model.embed_tokens.weight")?;
        batch(&prompts, |tokens| embed(spec, &embedding, tokens))?
    };
    weights.release("model.embed_tokens.");
    let layers = spec.layers.len();
    for l in 0..layers {
        watcher.go_on()?;
        let layer = Layer::load_on(weights, spec, l, placement)?;
        let mut first = 0;
        for batch in &mut batches {
            let mut tables = Tables::new(&batch.positions);
            let table = tables.of(layer.rope());
            let passed = layer.forward(spec, &batch.stream, table, Past::None(&batch.rows))?;
            batch.stream = passed.stream;
            if let Some(routing) = passed.routing {
                for (i, rows) in batch.rows.iter().enumerate() {
                    let k = routing.top_k;
                    watcher.routed(WindowRouting {
                        text: pieces[first + i].text,
                        skip: usize::from(bos.is_some()),
                        experts: layer.experts(),
                        routing: &Routing {
                            tokens: rows.len(),
                            top_k: k,
                            ids: routing.ids[rows.start * k..rows.end * k].to_vec(),
                            weights: routing.weights[rows.start * k..rows.end * k].to_vec(),
                        },
                    });
                }
            }
            first += batch.rows.len();
        }
        drop(layer);
        weights.release(&format!("model.layers.{l}."));
        watcher.advance(tokens * (l + 1) / layers - tokens * l / layers);
    }
    watcher.go_on()?;
    let scored = score(run, pieces, &batches)?;
    for (place, nats) in scored {
        sums[place.text].nats += nats;
        sums[place.text].tokens += 1;
        watcher.scored(place.text, place.position, nats);
    }
    Ok(())
}

/// A hidden state and the token that follows it.
struct Place {
    text: usize,
    /// Of the token that follows, in its window.
    position: usize,
    next: u32,
}

/// Through the head, block by block: the surprise of every scored token, in order.
fn score(
    run: &Run<'_>,
    pieces: &[Piece],
    batches: &[Batch],
) -> Result<Vec<(Place, f64)>, TextError> {
    let Run { spec, weights, texts, placement, .. } = *run;
    let bos = usize::from(run.bos.is_some());
    let (mut states, mut places) = (Vec::new(), Vec::new());
    let last = norm(weights, spec, "model.norm.weight")?;
    let mut rest = pieces.iter();
    for batch in batches {
        let x = to_vec(&last.forward(&batch.stream).map_err(ModelError::from)?)
            .map_err(ModelError::from)?;
        for (rows, piece) in batch.rows.iter().zip(rest.by_ref()) {
            for i in piece.window.scored..piece.window.end {
                let row = rows.start + i - piece.window.start + bos - 1;
                states.extend_from_slice(&x[row * spec.hidden..(row + 1) * spec.hidden]);
                let next = texts[piece.text].tokens[i];
                if next as usize >= spec.vocab {
                    return Err(TextError::UnknownToken { token: next, vocab: spec.vocab });
                }
                let position = i - piece.window.start;
                places.push(Place { text: piece.text, position, next });
            }
        }
    }
    let name = if spec.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let head = weights.stored(name)?;
    let mut totals = vec![LogSumExp::default(); places.len()];
    let mut own = vec![0f32; places.len()];
    let mut logits = Vec::new();
    for from in (0..spec.vocab).step_by(HEAD_ROWS) {
        let to = spec.vocab.min(from + HEAD_ROWS);
        let (bytes, dtype) = head_block(&head, from, to)?;
        let block =
            MatView::new(&bytes, dtype, to - from, spec.hidden).map_err(ModelError::from)?;
        let placed = placement.linear(block, None, Accuracy::Exact)?;
        let chunks = places.chunks(HEAD_TOKENS).zip(states.chunks(HEAD_TOKENS * spec.hidden));
        let results = totals.chunks_mut(HEAD_TOKENS).zip(own.chunks_mut(HEAD_TOKENS));
        for ((places, states), (totals, own)) in chunks.zip(results) {
            logits.resize(places.len() * (to - from), 0.0);
            match &placed {
                Some(placed) => placed.forward(states, &mut logits).map_err(ModelError::from)?,
                None => linear(states, block, None, &mut logits, &Exec::default())
                    .map_err(ModelError::from)?,
            }
            let rows = logits.par_chunks_mut(to - from).zip(places);
            rows.zip(totals).zip(own).for_each(|(((row, place), total), own)| {
                spec.finish_logits(row);
                total.add(row);
                if (from..to).contains(&(place.next as usize)) {
                    *own = row[place.next as usize - from];
                }
            });
        }
    }
    head.release();
    let surprises = totals.iter().zip(&own).map(|(total, own)| total.value() - f64::from(*own));
    let scored: Vec<(Place, f64)> = places.into_iter().zip(surprises).collect();
    match scored.iter().find(|(_, nats)| nats.is_nan()) {
        Some((place, _)) => Err(TextError::NotANumber { token: place.next as usize }),
        None => Ok(scored),
    }
}

/// Rows of the head as stored, or computed.
pub(crate) fn head_block(
    head: &WeightRef,
    from: usize,
    to: usize,
) -> Result<(std::borrow::Cow<'_, [u8]>, Dtype), ModelError> {
    let cols = head.cols();
    if let Some(bytes) = head.bytes() {
        let width = cols * head.dtype().size();
        return Ok((bytes[from * width..to * width].into(), head.dtype()));
    }
    let mut bytes = vec![0u8; (to - from) * cols * 4];
    bytes
        .par_chunks_mut(64 * cols * 4)
        .enumerate()
        .map(|(i, out)| {
            let start = from + i * 64;
            let mut values = vec![0.0; out.len() / 4];
            head.read_rows(start..start + values.len() / cols, &mut values)?;
            moe_merge_kernels::cast::narrow(&values, Dtype::F32, out);
            Ok(())
        })
        .collect::<Result<(), ModelError>>()?;
    Ok((bytes.into(), Dtype::F32))
}

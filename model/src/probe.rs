//! Hidden states of prompts, layer by layer, with one layer in memory at a time.

use std::ops::Range;

use candle_core::Tensor;
use moe_merge_checkpoint::Source;

use crate::error::ModelError;
use crate::layer::{Layer, Past};
use crate::model::{Tables, check_length, embed};
use crate::ops::to_vec;
use crate::placement::Placement;
use crate::spec::Spec;
use crate::weights::Weights;

/// What one layer sees of the prompts.
#[derive(Debug)]
pub struct LayerProbe<'a> {
    /// The layer.
    pub layer: usize,
    /// The stream that enters the layer, per prompt `[tokens, hidden]`: for layer 0 the embeddings.
    pub stream: &'a [Vec<f32>],
    /// Output of the norm before the MLP, per prompt `[tokens, hidden]`: what a router would see.
    pub router_input: &'a [Vec<f32>],
}

/// Tokens that go through a layer in one go: bounds the activations inside it.
const BATCH_TOKENS: usize = 2048;

/// Prompts that go through a layer together, one after the other in one matrix.
pub(crate) struct Batch {
    /// Rows of each prompt.
    pub rows: Vec<Range<usize>>,
    pub positions: Vec<u32>,
    pub stream: Tensor,
}

/// Runs all prompts through one layer after the other and shows what each layer sees.
///
/// Weights are views; the pages of a layer are let go after it. Memory: one layer and the streams of all prompts.
///
/// # Errors
/// [`ModelError`] as [`crate::Model::open`] and [`crate::Model::forward`], or what `visit` returns.
pub fn probe(
    source: &Source,
    prompts: &[Vec<u32>],
    visit: &mut dyn FnMut(LayerProbe<'_>) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    probe_on(source, prompts, &Placement::cpu(), visit)
}

/// As [`probe`], with products where `placement` says.
pub(crate) fn probe_on(
    source: &Source,
    prompts: &[Vec<u32>],
    placement: &Placement,
    visit: &mut dyn FnMut(LayerProbe<'_>) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let spec = Spec::of(source)?;
    let weights = Weights::new(source, &spec)?;
    for prompt in prompts {
        check_length(&spec, prompt.len())?;
    }
    let mut batches = {
        let embedding = weights.stored("model.embed_tokens.weight")?;
        batch(prompts, |tokens| embed(&spec, &embedding, tokens))?
    };
    weights.release("model.embed_tokens.");
    for l in 0..spec.layers.len() {
        let layer = Layer::load_on(&weights, &spec, l, placement)?;
        let (mut streams, mut inputs) = (Vec::new(), Vec::new());
        for batch in &mut batches {
            let mut tables = Tables::new(&batch.positions);
            let table = tables.of(layer.rope());
            let passed = layer.forward(&spec, &batch.stream, table, Past::None(&batch.rows))?;
            split(&batch.stream, &batch.rows, spec.hidden, &mut streams)?;
            split(&passed.mlp_input, &batch.rows, spec.hidden, &mut inputs)?;
            batch.stream = passed.stream;
        }
        drop(layer);
        weights.release(&format!("model.layers.{l}."));
        visit(LayerProbe { layer: l, stream: &streams, router_input: &inputs })?;
    }
    Ok(())
}

/// Cuts prompts into batches and embeds them.
pub(crate) fn batch(
    prompts: &[Vec<u32>],
    embed: impl Fn(&[u32]) -> Result<Tensor, ModelError>,
) -> Result<Vec<Batch>, ModelError> {
    let (mut batches, mut from) = (Vec::new(), 0);
    while from < prompts.len() {
        let (mut to, mut tokens) = (from, 0);
        while to < prompts.len() && (to == from || tokens + prompts[to].len() <= BATCH_TOKENS) {
            tokens += prompts[to].len();
            to += 1;
        }
        batches.push(Batch::of(prompts[from..to].iter().map(Vec::as_slice), &embed)?);
        from = to;
    }
    Ok(batches)
}

impl Batch {
    /// Texts one after the other, embedded.
    pub fn of<'t>(
        texts: impl Iterator<Item = &'t [u32]>,
        embed: impl FnOnce(&[u32]) -> Result<Tensor, ModelError>,
    ) -> Result<Self, ModelError> {
        let (mut tokens, mut rows, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for text in texts {
            rows.push(tokens.len()..tokens.len() + text.len());
            positions.extend(0..text.len() as u32);
            tokens.extend_from_slice(text);
        }
        Ok(Self { stream: embed(&tokens)?, rows, positions })
    }
}

fn split(
    x: &Tensor,
    rows: &[Range<usize>],
    hidden: usize,
    out: &mut Vec<Vec<f32>>,
) -> Result<(), ModelError> {
    let values = to_vec(x)?;
    out.extend(rows.iter().map(|r| values[r.start * hidden..r.end * hidden].to_vec()));
    Ok(())
}

//! A MoE layer by layer, with routers that are decided on the way.
//!
//! What a router sees depends on the routers below it. Here each layer's router is asked for when the text has come that
//! far, and the text goes on through the router that was given: sequential calibration.

use candle_core::{Device, Tensor};
use moe_merge_checkpoint::Source;
use rayon::prelude::*;

use crate::error::ModelError;
use crate::layer::{Gating, Layer, OtherRouter, Past};
use crate::model::{Tables, check_length, embed};
use crate::ops::to_vec;
use crate::probe::{Batch, batch};
use crate::spec::{MoeMlp, Spec};
use crate::weights::Weights;

/// What the router of one layer has to decide on.
#[derive(Debug)]
pub struct RouterView<'a> {
    /// The layer.
    pub layer: usize,
    /// Its rule and number of experts.
    pub moe: &'a MoeMlp,
    /// Router input of every token, sequence after sequence: `[tokens, hidden]`.
    pub inputs: &'a [f32],
    /// `[tokens, experts, experts]`: inner products of what the experts make of a token, each taken about the mean of all
    /// experts; empty where they were not asked for.
    pub outputs: &'a [f32],
}

/// Whether a walk computes what every expert makes of every token, which takes as long as so many forward passes as there
/// are experts for each that a token visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outputs {
    /// [`RouterView::outputs`] is filled.
    Compare,
    /// It is empty.
    Skip,
}

/// Router weights `[experts, hidden]`, chosen for what a [`RouterView`] shows.
pub type Decide<'a> = dyn FnMut(RouterView<'_>) -> Result<Vec<f32>, ModelError> + 'a;

/// Takes `sequences` through the MoE in `source`, asking `decide` for the router of each MoE layer when they reach it. The
/// routers stored in `source` are not looked at.
///
/// Memory: one layer, the streams and router inputs of all tokens, and `outputs`.
///
/// # Errors
/// As [`crate::Model::open`] and [`crate::Model::forward`], or what `decide` returns.
pub fn walk(
    source: &Source,
    sequences: &[Vec<u32>],
    outputs: Outputs,
    decide: &mut Decide<'_>,
) -> Result<(), ModelError> {
    let spec = Spec::of(source)?;
    let weights = Weights::new(source, &spec)?;
    for sequence in sequences {
        check_length(&spec, sequence.len())?;
    }
    let mut batches = {
        let embedding = weights.stored("model.embed_tokens.weight")?;
        batch(sequences, |tokens| embed(&spec, &embedding, tokens))?
    };
    weights.release("model.embed_tokens.");
    for l in 0..spec.layers.len() {
        let layer = Layer::load(&weights, &spec, l)?;
        step(&spec, &layer, l, &mut batches, outputs, decide)?;
        drop(layer);
        weights.release(&format!("model.layers.{l}."));
    }
    Ok(())
}

fn step(
    spec: &Spec,
    layer: &Layer,
    number: usize,
    batches: &mut [Batch],
    outputs: Outputs,
    decide: &mut Decide<'_>,
) -> Result<(), ModelError> {
    let (mut halves, mut inputs, mut products) = (Vec::new(), Vec::new(), Vec::new());
    for batch in batches.iter() {
        let mut tables = Tables::new(&batch.positions);
        let table = tables.of(layer.rope());
        let half = layer.attended(spec, &batch.stream, table, Past::None(&batch.rows))?;
        if layer.experts() > 0 {
            inputs.extend(to_vec(&half.1)?);
            if outputs == Outputs::Compare {
                compare(spec, layer, &half.1, &mut products)?;
            }
        }
        halves.push(half);
    }
    let gate = match layer.router() {
        None => None,
        Some((moe, _)) => {
            let view = RouterView { layer: number, moe, inputs: &inputs, outputs: &products };
            let rows = decide(view)?;
            Some((Tensor::from_vec(rows, (moe.experts, spec.hidden), &Device::Cpu)?, moe))
        }
    };
    for (batch, (x, mlp_input)) in batches.iter_mut().zip(halves) {
        let gating = match &gate {
            None => Gating::Stored,
            Some((weights, moe)) => {
                let top_k = moe.router.top_k;
                Gating::Weights(OtherRouter { weights, top_k })
            }
        };
        batch.stream = layer.fed(spec, &x, mlp_input, gating)?.stream;
    }
    Ok(())
}

/// Adds the inner products of the experts' outputs about their mean, token by token.
fn compare(
    spec: &Spec,
    layer: &Layer,
    mlp_input: &Tensor,
    products: &mut Vec<f32>,
) -> Result<(), ModelError> {
    /// Tokens at a time: what all experts make of them is in memory together.
    const TOKENS: usize = 256;
    let (tokens, hidden) = (mlp_input.dim(0)?, spec.hidden);
    for from in (0..tokens).step_by(TOKENS) {
        let count = TOKENS.min(tokens - from);
        let part = mlp_input.narrow(0, from, count)?.contiguous()?;
        let made: Vec<Vec<f32>> = layer
            .expert_outputs(spec.activation, &part)?
            .iter()
            .map(to_vec)
            .collect::<Result<_, _>>()?;
        let experts = made.len();
        let start = products.len();
        products.resize(start + count * experts * experts, 0.0);
        products[start..].par_chunks_mut(experts * experts).enumerate().for_each(|(t, out)| {
            let mut rows: Vec<f32> = Vec::with_capacity(experts * hidden);
            made.iter().for_each(|m| rows.extend_from_slice(&m[t * hidden..(t + 1) * hidden]));
            centre(&mut rows, experts, hidden);
            for a in 0..experts {
                for b in a..experts {
                    let (x, y) = (&rows[a * hidden..][..hidden], &rows[b * hidden..][..hidden]);
                    let product: f64 =
                        x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
                    out[a * experts + b] = product as f32;
                    out[b * experts + a] = product as f32;
                }
            }
        });
    }
    Ok(())
}

/// Takes the mean row from every row: what all experts agree on changes no choice among them, and would drown it.
fn centre(rows: &mut [f32], count: usize, width: usize) {
    for k in 0..width {
        let mean = (0..count).map(|e| f64::from(rows[e * width + k])).sum::<f64>() / count as f64;
        (0..count).for_each(|e| rows[e * width + k] -= mean as f32);
    }
}

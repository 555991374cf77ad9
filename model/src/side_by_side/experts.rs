//! The experts of two models on the same texts.

use moe_merge_checkpoint::Source;

use crate::error::ModelError;
use crate::layer::Past;
use crate::model::Tables;
use crate::ops::to_vec;
use crate::running::Running;

/// Tokens at a time: what all experts of both models make of them is in memory together.
const TOKENS: usize = 256;

/// What the routed experts of two models make of the same tokens in one layer, whichever the routers would choose.
#[derive(Debug)]
pub struct ExpertOutputs<'a> {
    /// The layer.
    pub layer: usize,
    /// Of both models, for each expert `[tokens, hidden]`.
    pub outputs: [&'a [Vec<f32>]; 2],
}

/// Takes `texts` through two MoE models, each in its own stream, and shows what their experts make of the tokens.
///
/// * memory: a layer and the streams of all texts of each model, the outputs of all experts for 256 tokens
///
/// # Errors
/// As [`crate::Model::open`] and [`crate::Model::forward`], and what `see` returns.
pub fn compare_experts(
    models: [&Source; 2],
    texts: &[Vec<u32>],
    see: &mut dyn FnMut(ExpertOutputs<'_>) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let mut sides = Vec::new();
    for source in models {
        let model = Running::new(source)?;
        let batches = model.embedded(texts)?;
        sides.push((model, batches));
    }
    let count = sides.iter().map(|(model, _)| model.spec.layers.len()).min().unwrap_or(0);
    for index in 0..count {
        let mut inputs = Vec::new(); // of each model, of each batch, [tokens, hidden]
        let mut layers = Vec::new();
        for (model, batches) in &sides {
            let layer = model.layer(index)?;
            let mut own = Vec::new();
            for batch in batches {
                let mut tables = Tables::new(&batch.positions);
                let (table, past) = (tables.of(layer.rope()), Past::None(&batch.rows));
                own.push(layer.attended(&model.spec, &batch.stream, table, past)?.1);
            }
            inputs.push(own);
            layers.push(layer);
        }
        if layers.iter().all(|l| l.experts() > 0) {
            for pair in inputs[0].iter().zip(&inputs[1]) {
                let pair = [pair.0, pair.1];
                let tokens = pair[0].dim(0)?;
                for from in (0..tokens).step_by(TOKENS) {
                    let made = |m: usize| -> Result<Vec<Vec<f32>>, ModelError> {
                        let count = TOKENS.min(tokens - from);
                        let part = pair[m].narrow(0, from, count)?.contiguous()?;
                        let made = layers[m].expert_outputs(sides[m].0.spec.activation, &part)?;
                        Ok(made.iter().map(to_vec).collect::<Result<_, _>>()?)
                    };
                    let (left, right) = (made(0)?, made(1)?);
                    see(ExpertOutputs { layer: index, outputs: [&left, &right] })?;
                }
            }
        }
        for ((model, batches), layer) in sides.iter_mut().zip(&layers) {
            model.pass(layer, batches)?;
            model.release(index);
        }
    }
    Ok(())
}

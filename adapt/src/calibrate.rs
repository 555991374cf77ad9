//! Routers for a model with a new expert: one row of each, or all of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_merge_checkpoint::weight::{OwnedWeight, Retyped};
use moe_merge_checkpoint::{Dtype, Interrupt, Source, WeightRef};
use moe_merge_merge::MergeError;
use moe_merge_merge::build::Observer;
use moe_merge_merge::calibrate::{CalibrateOptions, Calibration};
use moe_merge_merge::documents::{
    Cutting, DEFAULT_PROMPT_TOKENS, Encoder, LabelledPrompts, Unprompted, encode_labelled,
    read_labelled,
};
use moe_merge_merge::gates::TokenPrompts;
use moe_merge_model::spec::MoeMlp;
use moe_merge_model::{ModelError, Spec, probe};
use moe_merge_router::{RowSamples, fit_row};
use serde_json::{Value, json};

use crate::effect::{names_then, stored_recipe};
use crate::error::AdaptError;
use crate::moe::Moe;

/// Which rows of the routers are fitted to text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// Those of the expert that changes; all others stay.
    New,
    /// All, as `calibrate` does.
    All,
}

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct Recalibration {
    /// Which rows.
    pub rows: Rows,
    /// Text of the experts, as `calibrate` takes it; experts without text in it have that of the recipe in the folder.
    pub prompts: Option<PathBuf>,
}

/// New routers.
#[derive(Debug)]
pub(crate) struct Recalibrated {
    pub tensors: Vec<(String, WeightRef)>,
    pub details: Value,
    /// How the routers are made now, if all of them are new.
    pub gate_mode: Option<String>,
    pub notes: Vec<String>,
}

impl Recalibration {
    /// Fits routers of `after`, the model as the change makes it.
    ///
    /// * `moe`: the model before; `names`: those of the experts after; `expert`: the new one's number
    ///
    /// # Errors
    /// Text that cannot be used, an expert without text, what running the model meets.
    pub(crate) fn run(
        &self,
        moe: &Moe,
        after: &Source,
        names: &[String],
        expert: usize,
        interrupt: &Interrupt,
        observer: &dyn Observer,
    ) -> Result<Recalibrated, AdaptError> {
        let (labelled, notes) = self.prompts(moe, names)?;
        match self.rows {
            Rows::New => {
                let encoder = Encoder::new(&moe.source)?;
                let bos = encoder.tokenizer().bos().is_some();
                let cutting = Cutting::Budget(DEFAULT_PROMPT_TOKENS);
                let (prompts, cut) = encode_labelled(&encoder, &labelled, cutting)?;
                let without = prompts[expert].positive.is_empty();
                if without || prompts.iter().filter(|p| !p.positive.is_empty()).count() < 2 {
                    return Err(AdaptError::NoText {
                        path: moe.source.path.clone(),
                        expert: names[expert].clone(),
                    });
                }
                let tokens: Vec<usize> = prompts.iter().map(TokenPrompts::tokens).collect();
                let tensors = new_rows(after, expert, &prompts, bos, interrupt)?;
                let details = json!({ "rows": "new", "tokens": tokens });
                let notes = notes.into_iter().chain(cut).collect();
                Ok(Recalibrated { tensors, details, gate_mode: None, notes })
            }
            Rows::All => {
                let options = CalibrateOptions {
                    estimator: "auto".into(),
                    prompts: Some(self.file(moe)?),
                    prompt_tokens: None,
                    self_text: 0,
                    train: None,
                    seed: 0,
                    interrupt: interrupt.clone(),
                };
                let names = Some(names.to_vec());
                let all = Calibration::of(after.clone(), names, moe.generation(), options)?;
                let fitted = all.fitted(observer)?;
                let notes = notes.into_iter().chain(fitted.notes).collect();
                let gate_mode = Some(fitted.estimator.to_owned());
                Ok(Recalibrated {
                    tensors: fitted.tensors,
                    details: fitted.details,
                    gate_mode,
                    notes,
                })
            }
        }
    }

    /// The file with text.
    fn file(&self, moe: &Moe) -> Result<PathBuf, AdaptError> {
        self.prompts.clone().or_else(|| stored_recipe(&moe.source.path)).ok_or_else(|| {
            AdaptError::NoText { path: moe.source.path.clone(), expert: String::new() }
        })
    }

    /// Text of all experts.
    fn prompts(
        &self,
        moe: &Moe,
        names: &[String],
    ) -> Result<(Vec<LabelledPrompts>, Vec<String>), AdaptError> {
        let stored = stored_recipe(&moe.source.path);
        let read = |file: &Path, names: &[String]| read_labelled(file, names, Unprompted::Allowed);
        let Some(file) = &self.prompts else {
            return match stored {
                // Its experts are those of before, in their order.
                Some(recipe) => Ok(read(&recipe, &names_then(moe))
                    .map(|(found, notes)| (padded(found, names), notes))?),
                None => {
                    Err(AdaptError::NoText { path: moe.source.path.clone(), expert: String::new() })
                }
            };
        };
        let (mut found, mut notes) = read(file, names)?;
        let missing = found.iter().any(|f| f.positive.is_empty());
        if let Some(recipe) = stored.filter(|_| missing)
            && let Ok((old, more)) = read(&recipe, &names_then(moe))
        {
            for (found, old) in found.iter_mut().zip(old) {
                if found.positive.is_empty() {
                    (found.positive, found.negative) = (old.positive, old.negative);
                }
            }
            notes.extend(more);
        }
        Ok((found, notes))
    }
}

/// One entry for each of `names`.
fn padded(mut found: Vec<LabelledPrompts>, names: &[String]) -> Vec<LabelledPrompts> {
    for (expert, name) in names.iter().enumerate().skip(found.len()) {
        found.push(LabelledPrompts {
            expert,
            label: name.clone(),
            positive: Vec::new(),
            negative: Vec::new(),
        });
    }
    found
}

/// Routers with a new row for `expert`.
///
/// What a layer sees depends on the routers before it: a second pass sees what the rows of the first one give.
fn new_rows(
    after: &Source,
    expert: usize,
    prompts: &[TokenPrompts],
    bos: bool,
    interrupt: &Interrupt,
) -> Result<Vec<(String, WeightRef)>, AdaptError> {
    const PASSES: usize = 2;
    let mut source = after.clone();
    let mut routers = Vec::new();
    for _ in 0..PASSES {
        routers = pass(&source, expert, prompts, bos, interrupt)?;
        source.tensors.extend(routers.iter().cloned());
    }
    Ok(routers)
}

fn pass(
    source: &Source,
    expert: usize,
    prompts: &[TokenPrompts],
    bos: bool,
    interrupt: &Interrupt,
) -> Result<Vec<(String, WeightRef)>, AdaptError> {
    let spec = Spec::of(source)?;
    let all: Vec<(bool, &Vec<u32>)> = prompts
        .iter()
        .enumerate()
        .flat_map(|(e, p)| p.positive.iter().map(move |tokens| (e == expert, tokens)))
        .collect();
    let tokens: Vec<Vec<u32>> = all.iter().map(|(_, tokens)| (*tokens).clone()).collect();
    let own: Vec<bool> = all.iter().map(|(own, _)| *own).collect();
    let layers: std::collections::BTreeMap<usize, &MoeMlp> = spec.moe_layers().collect();
    let mut routers = Vec::new();
    let mut failed = None;
    probe(source, &tokens, &mut |seen| {
        interrupt.check()?;
        let Some(moe) = layers.get(&seen.layer) else { return Ok(()) };
        let inputs = seen.router_input;
        match row(source, &spec, seen.layer, moe, expert, inputs, &own, bos) {
            Ok(router) => routers.push(router),
            Err(error) => {
                failed.get_or_insert(error);
            }
        }
        Ok::<(), ModelError>(())
    })?;
    match failed {
        Some(error) => Err(error),
        None => Ok(routers),
    }
}

/// The router of a layer with a new row.
#[expect(clippy::too_many_arguments, reason = "what one layer's row is made of")]
fn row(
    source: &Source,
    spec: &Spec,
    layer: usize,
    moe: &MoeMlp,
    expert: usize,
    inputs: &[Vec<f32>],
    own: &[bool],
    bos: bool,
) -> Result<(String, WeightRef), AdaptError> {
    let name = format!("model.layers.{layer}.{}", moe.names.router());
    let old = source.weight(&name)?;
    let mut rows = old.to_f32()?;
    let hidden = spec.hidden;
    let skip = usize::from(bos) * hidden;
    let (mut x, mut others, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    for (input, own) in inputs.iter().zip(own) {
        for token in input[skip.min(input.len())..].chunks_exact(hidden) {
            let logits = rows.chunks_exact(hidden).enumerate().filter(|(e, _)| *e != expert);
            let logits = logits.map(|(_, row)| {
                row.iter().zip(token).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>()
            });
            others.push(log_sum_exp(&logits.collect::<Vec<f64>>()) as f32);
            labels.push(*own);
            x.extend_from_slice(token);
        }
    }
    let place = expert * hidden..(expert + 1) * hidden;
    let samples = RowSamples { inputs: &x, others: &others, own: &labels };
    let fitted = fit_row(samples, &rows[place.clone()])
        .map_err(|source| MergeError::Router { layer, source })?;
    rows[place].copy_from_slice(&fitted);
    let weight = OwnedWeight::from_f32(&name, &rows, old.shape(), Dtype::F32);
    Ok((name, Retyped::of(Arc::new(weight), old.dtype())))
}

/// `ln Σ exp(v)`.
fn log_sum_exp(values: &[f64]) -> f64 {
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if most == f64::NEG_INFINITY {
        return most;
    }
    most + values.iter().map(|v| (v - most).exp()).sum::<f64>().ln()
}

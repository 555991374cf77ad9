//! Gates for a recipe: the prompts run through the base once, an estimator turns each layer's view of them into a gate.

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::{CheckpointError, Source};
use moe_merge_model::{LayerProbe, ModelError, Spec, probe};
use moe_merge_router::report::{DegenerateGate, RoutingReport};
use moe_merge_router::{
    Estimator, Example, ExpertPrompts, Fit, Gate, Method, Options, RouterError, Samples, Sign,
    estimators, report,
};

use rayon::prelude::*;

use crate::error::MergeError;
use crate::sequential::learn;

/// The prompts of one expert as token ids, each beginning with bos where the tokenizer has one.
#[derive(Debug, Clone, Default)]
pub struct TokenPrompts {
    /// Text that the expert should get.
    pub positive: Vec<Vec<u32>>,
    /// Text that it should not get.
    pub negative: Vec<Vec<u32>>,
}

impl TokenPrompts {
    /// Tokens in all prompts.
    pub fn tokens(&self) -> usize {
        self.positive.iter().chain(&self.negative).map(Vec::len).sum()
    }
}

/// What gates are made from.
#[derive(Debug)]
pub struct GateRequest<'a> {
    /// The model whose hidden states the gates are computed from, unless `moe` is given.
    pub base: &'a Source,
    /// The MoE itself, for learned gates that are to be fitted to its own stream, layer by layer; its routers are not
    /// looked at.
    pub moe: Option<&'a Source>,
    /// How.
    pub estimator: &'static Estimator,
    /// Prompts of the routed experts, in order; a generalist, which comes last, has none and is left out.
    pub experts: &'a [TokenPrompts],
    /// Prompts of the shared experts, if they have a gate.
    pub shared: &'a [TokenPrompts],
    /// Experts per token, for the forecast.
    pub top_k: usize,
    /// Seed of random gates.
    pub seed: u64,
    /// Whether every prompt begins with a bos token, which learned estimators leave out: it is the same everywhere.
    pub bos: bool,
    /// Asked before every layer.
    pub interrupt: &'a Interrupt,
}

/// Gates of all layers, and what is known about them.
#[derive(Debug, Clone, Default)]
pub struct Routers {
    /// One gate `[experts, hidden]` per layer.
    pub layers: Vec<Gate>,
    /// One gate `[shared experts, hidden]` per layer; empty without prompted shared experts.
    pub shared: Vec<Gate>,
    /// Forecast from held-out prompts, for learned gates.
    pub forecast: Option<RoutingReport>,
    /// Squared error of the layers' output on the prompts, over that of an expert chosen at random, where outputs were
    /// matched.
    pub error: Option<f64>,
    /// Layers whose rows point nearly the same way, for mergekit's modes.
    pub degenerate: Vec<DegenerateGate>,
    /// What the estimator noticed about the prompts, in words, each with the layers it concerns.
    pub notes: Vec<String>,
}

/// Computes the gates of all layers, telling `done` after each.
///
/// Estimators that need hidden states run every prompt through `base` once, layer by layer, holding one layer's
/// weights at a time.
///
/// # Errors
/// What opening or running the base meets; [`MergeError::Router`] with the layer if the estimator refuses;
/// interruption.
pub fn compute(
    request: &GateRequest<'_>,
    done: &mut dyn FnMut(usize),
) -> Result<Routers, MergeError> {
    estimate_all(request, done).map_err(|error| match error {
        MergeError::Router { layer, source: RouterError::NotFinite { .. } } => {
            not_finite_weight(request.base, layer).err().unwrap_or(error)
        }
        other => other,
    })
}

/// Looks for the weight that made a hidden state NaN or infinite.
///
/// # Errors
/// [`CheckpointError::NotFinite`] for the first bad weight on the way to the router of `layer`.
fn not_finite_weight(base: &Source, layer: usize) -> Result<(), MergeError> {
    /// Numbers read at a time.
    const BLOCK: usize = 1 << 20;
    let number =
        |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
    let on_the_way = |name: &str| number(name).is_none_or(|n| n <= layer);
    for (_, weight) in base.tensors.iter().filter(|(name, _)| on_the_way(name)) {
        let (rows, cols) = (weight.rows(), weight.cols());
        let step = (BLOCK / cols.max(1)).max(1);
        let mut values = Vec::new();
        for first in (0..rows).step_by(step) {
            let block = first..rows.min(first + step);
            values.resize(block.len() * cols, 0.0);
            weight.read_rows(block, &mut values)?;
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                let (file, tensor) = weight.origin();
                return Err(
                    CheckpointError::NotFinite { file, tensor, index: first * cols + at }.into()
                );
            }
        }
    }
    Ok(())
}

/// [`compute`], with NaN and infinity blamed on the hidden states.
fn estimate_all(
    request: &GateRequest<'_>,
    done: &mut dyn FnMut(usize),
) -> Result<Routers, MergeError> {
    let spec = Spec::of(request.base)?;
    let (layers, hidden) = (spec.layers.len(), spec.hidden);
    let mut made = Made::default();
    let sequential = request.moe.filter(|_| request.estimator.method.learned());
    match request.estimator.method {
        Method::Seed(draw) => {
            let count = request.experts.len();
            for layer in 0..layers {
                made.gates.push(draw(count, hidden, request.seed, layer as u64));
                if !request.shared.is_empty() {
                    // A stream of its own: layers beyond the model's are never asked for otherwise.
                    let stream = (layers + layer) as u64;
                    made.shared.push(draw(request.shared.len(), hidden, request.seed, stream));
                }
                done(layer);
            }
        }
        Method::Embeddings(estimate) => {
            let rows = |prompts: &[TokenPrompts]| -> Result<Gate, MergeError> {
                let embedded = Embedded::read(request.base, &spec, prompts)?;
                estimate(&embedded.prompts(), hidden)
                    .map_err(|source| MergeError::Router { layer: 0, source })
            };
            let gate = rows(request.experts)?;
            made.gates = vec![gate; layers];
            if !request.shared.is_empty() {
                made.shared = vec![rows(request.shared)?; layers];
            }
            (0..layers).for_each(done);
        }
        Method::RouterInputs(_) | Method::Matching(_) if sequential.is_some() => {
            let Some(moe) = sequential else { return Ok(made.finish(request)) };
            let learned = learn(request, moe, done)?;
            made.shared(request, hidden)?;
            made.notes = learned.notes;
            made.error = learned.error;
            for (layer, gate, fit) in learned.layers {
                // Layers without experts have no router; their place stays empty.
                made.gates.resize(layer, Gate { experts: 0, hidden, rows: Vec::new() });
                made.gates.push(gate);
                made.fits.push((layer, fit));
            }
        }
        Method::Streams(_) | Method::RouterInputs(_) | Method::Matching(_) => {
            let prompts = flatten(request);
            let mut failed = None;
            let ran = probe(request.base, &prompts, &mut |layer| {
                request.interrupt.check()?;
                let last = layer.layer + 1 == layers;
                let result = made.layer(request, hidden, &layer);
                result.and_then(|()| made.fit(request, hidden, last, done)).map_err(|e| {
                    failed = Some(e);
                    ModelError::Stopped("no gate could be made".into())
                })
            });
            failed.map_or(Ok(()), Err)?;
            ran?;
        }
    }
    Ok(made.finish(request))
}

/// All prompts one after the other: experts' positives and negatives, then those of the shared experts.
fn flatten(request: &GateRequest<'_>) -> Vec<Vec<u32>> {
    let all = request.experts.iter().chain(request.shared);
    all.flat_map(|p| p.positive.iter().chain(&p.negative)).cloned().collect()
}

/// Puts the hidden states of [`flatten`]ed prompts back to their experts.
fn sort_out<'a>(prompts: &[TokenPrompts], states: &'a [Vec<f32>]) -> Vec<ExpertPrompts<'a>> {
    let mut rest = states.iter().map(Vec::as_slice);
    prompts
        .iter()
        .map(|p| ExpertPrompts {
            positive: rest.by_ref().take(p.positive.len()).collect(),
            negative: rest.by_ref().take(p.negative.len()).collect(),
        })
        .collect()
}

/// Bytes of router inputs that wait to be fitted together.
const WAITING: usize = 64 << 20;

#[derive(Default)]
struct Made {
    gates: Vec<Gate>,
    shared: Vec<Gate>,
    fits: Vec<(usize, Fit)>,
    /// Layers whose router inputs, one per prompt, wait for a fit: several layers keep all threads busy where one
    /// alone is too small to share.
    waiting: Vec<(usize, Vec<Vec<f32>>)>,
    /// Layers that were seen and not yet told of.
    seen: Vec<usize>,
    notes: Vec<String>,
    error: Option<f64>,
}

impl Made {
    fn layer(
        &mut self,
        request: &GateRequest<'_>,
        hidden: usize,
        probe: &LayerProbe<'_>,
    ) -> Result<(), MergeError> {
        self.seen.push(probe.layer);
        let stopped = |source: RouterError| MergeError::Router { layer: probe.layer, source };
        let routed: usize =
            request.experts.iter().map(|p| p.positive.len() + p.negative.len()).sum();
        let (streams, shared_streams) = probe.stream.split_at(routed);
        match request.estimator.method {
            Method::Streams(estimate) => {
                let prompts = sort_out(request.experts, streams);
                self.gates.push(estimate(&prompts, hidden).map_err(stopped)?);
            }
            Method::RouterInputs(_) | Method::Matching(_) => {
                self.waiting.push((probe.layer, probe.router_input[..routed].to_vec()));
            }
            Method::Seed(_) | Method::Embeddings(_) => {}
        }
        if !request.shared.is_empty() {
            // One row before a sigmoid, not a choice among experts: mergekit's own rule, whatever the estimator.
            let estimate = match request.estimator.method {
                Method::Streams(estimate) => estimate,
                _ => estimators::hidden::gate,
            };
            let prompts = sort_out(request.shared, shared_streams);
            self.shared.push(estimate(&prompts, hidden).map_err(stopped)?);
        }
        Ok(())
    }

    /// Gates of shared experts alone, from the base.
    fn shared(&mut self, request: &GateRequest<'_>, hidden: usize) -> Result<(), MergeError> {
        let prompts: Vec<Vec<u32>> = request
            .shared
            .iter()
            .flat_map(|p| p.positive.iter().chain(&p.negative))
            .cloned()
            .collect();
        if prompts.is_empty() {
            return Ok(());
        }
        let mut failed = None;
        let ran = probe(request.base, &prompts, &mut |layer| {
            request.interrupt.check()?;
            let own = sort_out(request.shared, layer.stream);
            match estimators::hidden::gate(&own, hidden) {
                Ok(gate) => self.shared.push(gate),
                Err(source) => {
                    failed = Some(MergeError::Router { layer: layer.layer, source });
                    return Err(ModelError::Stopped("no gate could be made".into()));
                }
            }
            Ok(())
        });
        failed.map_or(Ok(()), Err)?;
        Ok(ran?)
    }

    /// Fits the layers that wait, if they are many or there will be no more.
    fn fit(
        &mut self,
        request: &GateRequest<'_>,
        hidden: usize,
        last: bool,
        done: &mut dyn FnMut(usize),
    ) -> Result<(), MergeError> {
        let inputs = self.waiting.iter().flat_map(|(_, inputs)| inputs);
        let bytes: usize = inputs.map(|i| 4 * i.len()).sum();
        if !last && bytes > 0 && bytes < WAITING {
            return Ok(());
        }
        if let Method::RouterInputs(estimate) | Method::Matching(estimate) =
            request.estimator.method
        {
            let skip = if request.bos { hidden } else { 0 };
            let options = Options { top_k: request.top_k, ..Options::default() };
            let fits: Vec<Result<(usize, Fit), MergeError>> = std::mem::take(&mut self.waiting)
                .into_par_iter()
                .map(|(layer, inputs)| {
                    request.interrupt.check()?;
                    let inputs = sort_out(request.experts, &inputs);
                    let fit = estimate(&samples(&inputs, hidden, skip), &options)
                        .map_err(|source| MergeError::Router { layer, source })?;
                    Ok((layer, fit))
                })
                .collect();
            for fit in fits {
                let (layer, fit) = fit?;
                self.gates.push(fit.gate.clone());
                self.fits.push((layer, fit));
            }
        }
        self.seen.drain(..).for_each(done);
        Ok(())
    }

    fn finish(self, request: &GateRequest<'_>) -> Routers {
        let learned = request.estimator.method.learned();
        let drawn = matches!(request.estimator.method, Method::Seed(_));
        let degenerate = if learned || drawn {
            Vec::new()
        } else {
            report::degenerate(self.gates.iter().enumerate())
        };
        let forecast = report::routing(self.fits.iter().map(|(layer, fit)| (*layer, fit)));
        let mut notes = notes(&self.fits);
        notes.extend(self.notes);
        Routers {
            error: self.error,
            layers: self.gates,
            shared: self.shared,
            forecast,
            degenerate,
            notes,
        }
    }
}

fn samples<'a>(prompts: &[ExpertPrompts<'a>], hidden: usize, skip: usize) -> Samples<'a> {
    let mut examples = Vec::new();
    for (expert, prompts) in prompts.iter().enumerate() {
        for (sign, inputs) in
            [(Sign::Positive, &prompts.positive), (Sign::Negative, &prompts.negative)]
        {
            examples.extend(inputs.iter().map(|i| Example { expert, sign, inputs: &i[skip..] }));
        }
    }
    Samples { experts: prompts.len(), hidden, examples }
}

/// Warnings of all layers, equal ones said once.
fn notes(fits: &[(usize, Fit)]) -> Vec<String> {
    let mut said: Vec<(String, Vec<usize>)> = Vec::new();
    for (layer, fit) in fits {
        for warning in &fit.warnings {
            let text = warning.to_string();
            match said.iter_mut().find(|(t, _)| *t == text) {
                Some((_, layers)) => layers.push(*layer),
                None => said.push((text, vec![*layer])),
            }
        }
    }
    said.into_iter()
        .map(|(text, layers)| match layers.as_slice() {
            all if all.len() == fits.len() => text,
            [one] => format!("{text} (layer {one})"),
            [first, .., last] => format!("{text} ({} layers from {first} to {last})", layers.len()),
            [] => text,
        })
        .collect()
}

/// Embedding rows of every prompt's tokens.
struct Embedded {
    experts: Vec<[Vec<Vec<f32>>; 2]>,
}

impl Embedded {
    fn read(base: &Source, spec: &Spec, prompts: &[TokenPrompts]) -> Result<Self, MergeError> {
        let table = base.weight("model.embed_tokens.weight")?;
        let rows = |ids: &Vec<u32>| -> Result<Vec<f32>, MergeError> {
            let mut out = vec![0.0; ids.len() * spec.hidden];
            for (&id, row) in ids.iter().zip(out.chunks_exact_mut(spec.hidden)) {
                if id as usize >= spec.vocab {
                    return Err(ModelError::Token { token: id, vocab: spec.vocab }.into());
                }
                table.read_rows(id as usize..id as usize + 1, row)?;
            }
            Ok(out)
        };
        let experts = prompts
            .iter()
            .map(|p| {
                let read = |ids: &[Vec<u32>]| ids.iter().map(rows).collect::<Result<Vec<_>, _>>();
                Ok([read(&p.positive)?, read(&p.negative)?])
            })
            .collect::<Result<Vec<_>, MergeError>>()?;
        Ok(Self { experts })
    }

    fn prompts(&self) -> Vec<ExpertPrompts<'_>> {
        fn slices(rows: &[Vec<f32>]) -> Vec<&[f32]> {
            rows.iter().map(Vec::as_slice).collect()
        }
        self.experts
            .iter()
            .map(|[positive, negative]| ExpertPrompts {
                positive: slices(positive),
                negative: slices(negative),
            })
            .collect()
    }
}

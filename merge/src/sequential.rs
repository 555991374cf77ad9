//! Learned routers, layer by layer on the stream of the merged model itself.

use moe_merge_checkpoint::Source;
use moe_merge_kernels::Score;
use moe_merge_model::spec::MoeMlp;
use moe_merge_model::{FirstToken, ModelError, Outputs, RouterView, Spec, first_token, walk};
use moe_merge_router::estimators::output_matching::{Anchor, Comparison, MatchOptions, fit};
use moe_merge_router::{Example, Fit, Gate, Method, Options, RouterError, Samples};

use crate::error::MergeError;
use crate::gates::GateRequest;
use crate::lessons::Lessons;

/// Numbers that compare the experts' outputs in one layer, at most: beyond it routers classify, they do not match.
const MOST_PRODUCTS: usize = 32 << 20;

/// Tokens of each expert that classifiers are fitted to and judged by before outputs are matched, about.
const CLASSIFIED: usize = 2000;

/// The penalty of output matching for one token of prompts; measured on two kinds of models, with 1 200 to 20 000 tokens.
const PENALTY: f64 = 0.02;

/// Routers of all MoE layers, `(layer, gate, fit of the prompts)`, and what a person should know.
pub(crate) struct Learned {
    pub layers: Vec<(usize, Gate, Fit)>,
    pub notes: Vec<String>,
    /// Error of the output over that of an expert chosen at random, mean over layers, where outputs were matched.
    pub error: Option<f64>,
}

/// Takes the prompts of `request` through `moe`, fitting each router when the prompts reach it.
///
/// Experts of `moe` beyond those of `request` have no text of their own: a router prefers none of them unless that makes
/// the output better.
///
/// # Errors
/// As [`walk`]; [`MergeError::Router`] with the layer; interruption.
pub(crate) fn learn(
    request: &GateRequest<'_>,
    moe: &Source,
    done: &mut dyn FnMut(usize),
) -> Result<Learned, MergeError> {
    let spec = Spec::of(moe)?;
    let lessons = Lessons::new(
        request.experts,
        request.bos,
        layer_numbers(moe),
        spec.max_positions,
        request.seed,
    );
    let (matching, mut notes) = matching(request, &spec, lessons.tokens.len());
    let first = match (matching, bos(request)) {
        (true, Some(bos)) => {
            request.interrupt.check()?;
            first_token(moe, bos, &(0..request.experts.len()).collect::<Vec<_>>())?
        }
        _ => None,
    };
    let outputs = if matching { Outputs::Compare } else { Outputs::Skip };
    let mut learner =
        Learner { request, lessons: &lessons, first, layers: Vec::new(), errors: Vec::new() };
    let mut failed = None;
    let ran = walk(moe, &lessons.sequences, outputs, &mut |view| {
        request.interrupt.check()?;
        let layer = view.layer;
        let rows = learner.layer(&view).map_err(|e| {
            failed = Some(e);
            ModelError::Stopped("no gate could be made".into())
        })?;
        done(layer);
        Ok(rows)
    });
    failed.map_or(Ok(()), Err)?;
    ran?;
    let errors = &learner.errors;
    let error = (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64);
    notes.retain(|n| !n.is_empty());
    Ok(Learned { layers: learner.layers, notes, error })
}

/// Numbers in the weights of all layers.
fn layer_numbers(moe: &Source) -> u64 {
    let layers = moe.tensors.iter().filter(|(name, _)| name.starts_with("model.layers."));
    layers.map(|(_, w)| w.shape().iter().product::<usize>() as u64).sum()
}

/// The token that every prompt begins with.
fn bos(request: &GateRequest<'_>) -> Option<u32> {
    let first = request.experts.iter().find_map(|p| p.positive.first()?.first());
    first.copied().filter(|_| request.bos)
}

/// Whether outputs are matched, and the reason if they should be but are not.
fn matching(request: &GateRequest<'_>, spec: &Spec, tokens: usize) -> (bool, Vec<String>) {
    if !matches!(request.estimator.method, Method::Matching(_)) {
        return (false, Vec::new());
    }
    let why_not = |moe: &MoeMlp| {
        let rule = &moe.router;
        if rule.score != Score::Softmax || !rule.renormalise || rule.groups.is_some() {
            Some("the model does not weigh the chosen experts by a softmax over them".to_owned())
        } else if tokens * moe.experts * moe.experts > MOST_PRODUCTS {
            Some(format!("{tokens} tokens are too many for {} experts", moe.experts))
        } else {
            None
        }
    };
    match spec.moe_layers().find_map(|(_, moe)| why_not(moe)) {
        None => (true, Vec::new()),
        Some(why) => (false, vec![format!("routers classify instead of matching outputs: {why}")]),
    }
}

struct Learner<'a> {
    request: &'a GateRequest<'a>,
    lessons: &'a Lessons,
    first: Option<FirstToken>,
    layers: Vec<(usize, Gate, Fit)>,
    errors: Vec<f64>,
}

impl Learner<'_> {
    /// The rows of one router, `[experts, hidden]`.
    fn layer(&mut self, view: &RouterView<'_>) -> Result<Vec<f32>, MergeError> {
        let refused = |source: RouterError| MergeError::Router { layer: view.layer, source };
        let hidden = view.inputs.len() / self.lessons.tokens.len().max(1);
        let (Method::RouterInputs(estimate) | Method::Matching(estimate)) =
            self.request.estimator.method
        else {
            return Err(refused(RouterError::TooFewExperts { experts: 0 }));
        };
        let labelled = self.request.experts.len();
        // Matching sees everything; where it starts from, and the forecast, need no more than this.
        let most = if view.outputs.is_empty() { usize::MAX } else { CLASSIFIED };
        let mut used = vec![0; labelled];
        let examples = self.lessons.prompts.iter().filter_map(|(expert, sign, rows)| {
            let used = &mut used[*expert];
            let more = *used < most;
            *used += rows.len();
            more.then(|| Example {
                expert: *expert,
                sign: *sign,
                inputs: &view.inputs[rows.start * hidden..rows.end * hidden],
            })
        });
        let samples = Samples { experts: labelled, hidden, examples: examples.collect() };
        let options = Options { top_k: view.moe.router.top_k, ..Options::default() };
        let fit = estimate(&samples, &options).map_err(refused)?;
        let mut gate = fit.gate.clone();
        // Rows sum to zero, so this is no evidence for it and none against.
        gate.rows.resize(view.moe.experts * hidden, 0.0);
        gate.experts = view.moe.experts;
        if !view.outputs.is_empty() {
            gate = self.matched(view, &gate).map_err(refused)?;
        }
        let rows = gate.rows.clone();
        self.layers.push((view.layer, gate, fit));
        Ok(rows)
    }

    fn matched(&mut self, view: &RouterView<'_>, start: &Gate) -> Result<Gate, RouterError> {
        let first = self.first.as_ref().and_then(|f| f.get(&view.layer));
        let anchor = first.map(|weights| Anchor { input: &view.inputs[..start.hidden], weights });
        let comparison = Comparison {
            experts: start.experts,
            hidden: start.hidden,
            top_k: view.moe.router.top_k,
            inputs: view.inputs,
            outputs: view.outputs,
            tokens: &self.lessons.tokens,
            anchor,
        };
        let matched = fit(&comparison, start, &options(self.lessons))?;
        self.errors.push(matched.error[1]);
        Ok(matched.gate)
    }
}

/// The more text, the less has to be assumed: what chance does to a sum over tokens falls with the root of their number.
fn options(lessons: &Lessons) -> MatchOptions {
    let tokens: usize = lessons.prompts.iter().map(|p| p.2.len()).sum();
    MatchOptions { penalty: PENALTY / (tokens.max(1) as f64).sqrt(), ..MatchOptions::default() }
}

//! Where the tokens of texts go, layer by layer, with what every router thought of every expert.

use moe_merge_checkpoint::Source;
use moe_merge_kernels::{Exec, RouterSpec, Routing, Score, activation, route, softmax};

use crate::error::ModelError;
use crate::perplexity::Windows;
use crate::placement::Placement;
use crate::probe::probe_on;
use crate::spec::{Mlp, MoeMlp, Spec};
use crate::streamed::TokenText;
use crate::text_error::TextError;
use crate::weights::Weights;

/// What the router of one layer did with one window of a text. The beginning-of-text token is not among its tokens.
#[derive(Debug)]
pub struct TracedWindow<'a> {
    /// Number of the text.
    pub text: usize,
    /// Number of the window's first token in the text.
    pub start: usize,
    /// The layer.
    pub layer: usize,
    /// Routed experts in it.
    pub experts: usize,
    /// Experts chosen and their weights, best first.
    pub routing: &'a Routing,
    /// `[tokens, experts]`, each row of sum 1: softmax over all experts, or the share of each expert in the sum of
    /// logistic scores where the model has those.
    pub probabilities: &'a [f32],
}

/// Bytes of hidden states held at a time; more text goes through the model in several passes.
const STATES: usize = 64 << 20;

/// Runs texts through the model, one layer in memory at a time, and shows what each router did with each window.
///
/// * `bos` stands before each window, and counts as one of its `window` tokens
/// * products run where `placement` says
/// * `visit` sees the windows of a pass in order, layer after layer; an error from it stops
///
/// Memory: one layer, and the hidden states of the windows of a pass (about 200 MB at most).
///
/// # Errors
/// [`ModelError::NoExperts`] for a dense model; [`TextError::EmptyText`], [`TextError::TooLong`] and
/// [`TextError::Parameter`] for texts and windows that cannot be used; what opening and running a model meets.
pub fn trace(
    source: &Source,
    texts: &[TokenText<'_>],
    bos: Option<u32>,
    window: usize,
    placement: &Placement,
    visit: &mut dyn FnMut(TracedWindow<'_>) -> Result<(), ModelError>,
) -> Result<(), TextError> {
    let spec = Spec::of(source)?;
    if spec.moe_layers().next().is_none() {
        let path = source.path.clone();
        return Err(ModelError::NoExperts { path, family: spec.family }.into());
    }
    let weights = Weights::new(source, &spec)?;
    let pieces = cut(&spec, texts, bos, window)?;
    let own = pieces.iter().map(|p| p.end - p.start + usize::from(bos.is_some()));
    let mut left = own.collect::<Vec<_>>();
    let mut rest = pieces.as_slice();
    while !rest.is_empty() {
        let mut held = 0;
        let fits = left.iter().take_while(|&&tokens| {
            held += tokens * spec.hidden * size_of::<f32>();
            held <= STATES
        });
        let count = fits.count().max(1);
        let (now, later) = rest.split_at(count);
        let prompts: Vec<Vec<u32>> = now
            .iter()
            .map(|p| bos.into_iter().chain(texts[p.text].tokens[p.start..p.end].to_vec()).collect())
            .collect();
        probe_on(source, &prompts, placement, &mut |seen| {
            let Mlp::Moe(moe) = &spec.layers[seen.layer].mlp else { return Ok(()) };
            let router = Router::load(&weights, moe, seen.layer)?;
            for (piece, input) in now.iter().zip(seen.router_input) {
                let own = &input[usize::from(bos.is_some()) * spec.hidden..];
                let (routing, probabilities) = router.apply(own, spec.hidden)?;
                visit(TracedWindow {
                    text: piece.text,
                    start: piece.start,
                    layer: seen.layer,
                    experts: moe.experts,
                    routing: &routing,
                    probabilities: &probabilities,
                })?;
            }
            Ok(())
        })?;
        rest = later;
        left.drain(..count);
    }
    Ok(())
}

/// Windows that a text of `tokens` tokens is cut into.
pub fn windows_of(tokens: usize, bos: Option<u32>, window: usize) -> usize {
    tokens.div_ceil(window.saturating_sub(usize::from(bos.is_some())).max(1))
}

struct Piece {
    text: usize,
    start: usize,
    end: usize,
}

fn cut(
    spec: &Spec,
    texts: &[TokenText<'_>],
    bos: Option<u32>,
    window: usize,
) -> Result<Vec<Piece>, TextError> {
    Windows { window, stride: None }.check_context(spec.max_positions)?;
    let content = window.saturating_sub(usize::from(bos.is_some()));
    if content == 0 {
        return Err(TextError::Parameter {
            name: "window",
            expected: "room for at least one token of text".into(),
            found: window.to_string(),
        });
    }
    let mut pieces = Vec::new();
    for (text, t) in texts.iter().enumerate() {
        if t.tokens.is_empty() {
            return Err(TextError::EmptyText {
                origin: t.origin.to_owned(),
                expected: "at least 1 token".into(),
                found: "0".into(),
            });
        }
        let starts = (0..t.tokens.len()).step_by(content);
        pieces.extend(starts.map(|start| Piece {
            text,
            start,
            end: t.tokens.len().min(start + content),
        }));
    }
    Ok(pieces)
}

/// The router of one layer, on its own.
struct Router<'a> {
    layer: usize,
    moe: &'a MoeMlp,
    gate: crate::ops::FrozenLinear,
    bias: Option<std::sync::Arc<[f32]>>,
}

impl<'a> Router<'a> {
    fn load(weights: &Weights, moe: &'a MoeMlp, layer: usize) -> Result<Self, ModelError> {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let gate = weights.frozen(weights.get(&at(moe.names.router()))?, None);
        let bias = moe.selection_bias.map(|name| weights.vector(&at(name))).transpose()?;
        Ok(Self { layer, moe, gate, bias })
    }

    /// Choice and probabilities for router inputs `[tokens, hidden]`.
    fn apply(&self, input: &[f32], hidden: usize) -> Result<(Routing, Vec<f32>), ModelError> {
        let (tokens, experts) = (input.len() / hidden, self.moe.experts);
        let mut logits = vec![0.0; tokens * experts];
        moe_merge_kernels::linear(input, self.gate.view()?, None, &mut logits, &Exec::default())?;
        let routing = route(&logits, tokens, experts, self.bias.as_deref(), &self.moe.router)
            .map_err(|source| ModelError::Router { layer: self.layer, source })?;
        logits.chunks_exact_mut(experts).for_each(|row| shares(row, &self.moe.router));
        Ok((routing, logits))
    }
}

/// Logits to probabilities, in place; finite, as the choice has checked.
pub(crate) fn shares(row: &mut [f32], spec: &RouterSpec) {
    match spec.score {
        Score::Softmax => return softmax(row),
        Score::Sigmoid => row.iter_mut().for_each(|l| *l = activation::sigmoid(*l)),
    }
    let sum: f32 = row.iter().sum();
    if sum > 0.0 {
        row.iter_mut().for_each(|p| *p /= sum);
    } else {
        let even = 1.0 / row.len() as f32;
        row.fill(even);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_by_hand() {
        let mut row = [0.0, 3f32.ln()];
        shares(&mut row, &RouterSpec::softmax(1));
        assert!((row[0] - 0.25).abs() < 1e-6 && (row[1] - 0.75).abs() < 1e-6);
        // Logistic scores 1/2 and 3/4: shares 2/5 and 3/5.
        let sigmoid = RouterSpec { score: Score::Sigmoid, ..RouterSpec::softmax(1) };
        let mut row = [0.0, 3f32.ln()];
        shares(&mut row, &sigmoid);
        assert!((row[0] - 0.4).abs() < 1e-6 && (row[1] - 0.6).abs() < 1e-6);
        let mut row = [-200.0, -200.0];
        shares(&mut row, &sigmoid);
        assert_eq!(row, [0.5, 0.5]);
    }

    #[test]
    fn windows_are_counted_with_their_first_token() {
        assert_eq!(windows_of(511, Some(1), 512), 1);
        assert_eq!(windows_of(512, Some(1), 512), 2);
        assert_eq!(windows_of(512, None, 512), 1);
    }
}

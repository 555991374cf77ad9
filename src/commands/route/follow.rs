//! The way of texts through a model, token by token.

use moe_merge_checkpoint::Source;
use moe_merge_model::streamed::TokenText;
use moe_merge_model::trace::{TracedWindow, trace};
use moe_merge_model::{Spec, Tokenizer};
use moe_merge_router::traffic::{Choices, Traffic};

use crate::args::Common;
use crate::commands::device;
use crate::exit;
use crate::picture::{Label, TokenRoutes};
use crate::progress::{Progress, Unit};
use crate::render::Failure;

use super::Text;

/// Per MoE layer the experts visited and their weights, best first.
pub type Visits = Vec<Vec<(u32, f32)>>;

/// What was found about one text: figures, and the visits of its first tokens.
pub struct Found {
    /// The figures.
    pub traffic: Traffic,
    /// Token by token.
    pub visits: Vec<Visits>,
}

/// Runs the texts through the model; `keep` tokens of each are followed one by one.
pub fn trace_all(
    source: &Source,
    tokenizer: &Tokenizer,
    texts: &[Text],
    labels: &[Option<Label>],
    (window, keep): (usize, usize),
    common: &Common,
) -> Result<Vec<Found>, Failure> {
    let mut found: Vec<Found> = texts
        .iter()
        .zip(labels)
        .map(|(text, label)| Found {
            traffic: Traffic::new(label.map(|l| l.expert)),
            visits: vec![Vec::new(); text.tokens.len().min(keep)],
        })
        .collect();
    let origins: Vec<TokenText<'_>> =
        texts.iter().map(|t| TokenText { tokens: &t.tokens, origin: &t.origin }).collect();
    let layers = Spec::of(source)?.moe_layers().count() as u64;
    let total = texts.iter().map(|t| t.tokens.len() as u64).sum();
    let progress = Progress::new(total, Unit::Tokens, common.quiet || common.json);
    let interrupt = exit::interrupt();
    let placement = device::find(common)?;
    let mut done = 0;
    trace(source, &origins, tokenizer.bos(), window, &placement, &mut |seen: TracedWindow<'_>| {
        interrupt.check()?;
        let (routing, found) = (seen.routing, &mut found[seen.text]);
        found.traffic.add(
            seen.layer,
            Choices {
                experts: seen.experts,
                top_k: routing.top_k,
                ids: &routing.ids,
                weights: &routing.weights,
                probabilities: seen.probabilities,
                position: 0,
            },
        );
        let chosen = routing.ids.chunks(routing.top_k).zip(routing.weights.chunks(routing.top_k));
        for (kept, (ids, weights)) in found.visits.iter_mut().skip(seen.start).zip(chosen) {
            kept.push(ids.iter().copied().zip(weights.iter().copied()).collect());
        }
        done += routing.tokens as u64;
        progress.set(done / layers.max(1), total);
        Ok(())
    })?;
    Ok(found)
}

/// The text of each token; empty for one that holds the beginning of a character only.
pub fn pieces(tokenizer: &Tokenizer, tokens: &[u32]) -> Result<Vec<String>, Failure> {
    let mut stream = tokenizer.stream();
    let mut pieces = Vec::with_capacity(tokens.len());
    for &id in tokens {
        let mut piece = stream.push(id)?;
        if piece.is_empty() && !tokenizer.decode(&[id])?.contains('\u{fffd}') {
            // Special tokens have no text of their own.
            piece = tokenizer.token_text(id).unwrap_or_default();
        }
        pieces.push(piece);
    }
    Ok(pieces)
}

/// A token, with the expert whose weight is largest when every layer counts the same; the lowest of equals.
pub fn token(id: u32, text: String, layers: Visits) -> TokenRoutes {
    let mut sums = std::collections::BTreeMap::<u32, f64>::new();
    for visits in &layers {
        let all: f64 = visits.iter().map(|v| f64::from(v.1)).sum();
        for &(expert, weight) in visits {
            let share = if all > 0.0 { f64::from(weight) / all } else { 1.0 / visits.len() as f64 };
            *sums.entry(expert).or_default() += share / layers.len() as f64;
        }
    }
    let most = sums.into_iter().reduce(|best, s| if s.1 > best.1 { s } else { best });
    let (expert, weight) = most.unwrap_or_default();
    TokenRoutes { id, text, expert: expert as usize, weight, layers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expert_of_a_token_has_the_largest_mean_weight() {
        // Layer weights are shares first: 2 has (0.75 + 0.5) / 2, although 1 has the larger raw number.
        let layers = vec![vec![(2, 0.3), (0, 0.1)], vec![(1, 0.9), (2, 0.9)]];
        let found = token(7, "x".into(), layers);
        assert_eq!(found.expert, 2);
        assert!((found.weight - 0.625).abs() < 1e-6);
        assert_eq!(token(7, "x".into(), vec![vec![(3, 1.0)], vec![(1, 1.0)]]).expert, 1);
    }
}

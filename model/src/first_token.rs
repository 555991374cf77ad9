//! Where the token goes that every text begins with.
//!
//! The beginning-of-text token says nothing about the text, so in every layer its experts are one fixed choice. What
//! follows it is predicted by that choice alone: a wrong expert costs more there than anywhere else.

use std::collections::BTreeMap;

use candle_core::Tensor;
use moe_merge_checkpoint::Source;
use moe_merge_kernels::Routing;

use crate::error::ModelError;
use crate::layer::{Gating, Layer, Past, norm};
use crate::model::{Tables, embed};
use crate::ops::{FrozenLinear, to_vec};
use crate::spec::Spec;
use crate::weights::Weights;

/// Sets of experts tried in a layer; with more experts than make so many, the ones that differ most in number.
const MOST_SETS: usize = 36;

/// Shares of the first of two experts.
const SHARES: [f32; 5] = [0.5, 0.1, 0.3, 0.7, 0.9];

/// Multiplications that a search may take; with a larger model there are fewer rounds, then only equal shares, then no search.
const MOST_WORK: u64 = 400_000_000_000;

/// Times that all layers are tried, at most.
const ROUNDS: u64 = 12;

/// For each MoE layer, how much weight each expert gets from the first token.
pub type FirstToken = BTreeMap<usize, Vec<f32>>;

/// The routing of `token` at the beginning of a text under which the model's prediction of the next token is nearest to
/// those of the `experts`: lowest mean of `KL(expert alone || mixture)`.
///
/// Coordinate descent: each pass over the layers tries every set of experts in every layer against the routing so far, the
/// best changes are then taken together, as many as help. Weights are views, layers are loaded one after the other.
///
/// * `experts`: those that have a domain of their own; a generalist is a choice, but nothing is expected of it
/// * returns `None` if the model is too large for a search, or has no MoE layer
///
/// # Errors
/// As [`crate::Model::open`] and [`crate::Model::forward`].
pub fn first_token(
    source: &Source,
    token: u32,
    experts: &[usize],
) -> Result<Option<FirstToken>, ModelError> {
    let spec = Spec::of(source)?;
    let moe: Vec<(usize, usize, usize)> =
        spec.moe_layers().map(|(l, m)| (l, m.experts, m.router.top_k.min(m.experts))).collect();
    let Some(&(_, count, top_k)) = moe.first() else { return Ok(None) };
    if experts.len() < 2 || moe.iter().any(|m| (m.1, m.2) != (count, top_k)) {
        return Ok(None);
    }
    let mut choices = choices(count, top_k, &SHARES);
    if work(source, &spec, moe.len() * choices.len()) > MOST_WORK {
        choices = self::choices(count, top_k, &SHARES[..1]);
    }
    if work(source, &spec, moe.len() * choices.len()) > MOST_WORK {
        return Ok(None);
    }
    let search = Search { weights: Weights::new(source, &spec)?, spec: &spec, token };
    let targets = search.alone(experts)?;
    // Everything open: no choice of so few experts can be judged without a start.
    let mut best: FirstToken = moe.iter().map(|m| (m.0, vec![1.0 / count as f32; count])).collect();
    let mut value = f64::INFINITY;
    let rounds = (MOST_WORK / work(source, &spec, moe.len() * choices.len()).max(1)).min(ROUNDS);
    for round in 0..rounds {
        let tried = search.each_layer(&best, &choices, &targets)?;
        // Layers whose best choice helps most come first.
        let mut order: Vec<(usize, usize, f64)> = tried
            .iter()
            .filter_map(|(&l, values)| {
                let at = (0..values.len()).min_by(|&a, &b| values[a].total_cmp(&values[b]))?;
                Some((l, at, values[at]))
            })
            .collect();
        order.sort_by(|a, b| a.2.total_cmp(&b.2).then(a.0.cmp(&b.0)));
        let together: Vec<FirstToken> = (1..=order.len())
            .map(|n| {
                let mut next = best.clone();
                order[..n].iter().for_each(|&(l, c, _)| drop(next.insert(l, choices[c].clone())));
                next
            })
            .collect();
        let values = search.values(&together, &targets)?;
        // The first round has to leave every layer with experts that it can choose.
        let allowed = if round == 0 { together.len() - 1 } else { 0 };
        let at = (allowed..together.len()).min_by(|&a, &b| values[a].total_cmp(&values[b]));
        match at {
            Some(at) if values[at] < value => {
                value = values[at];
                best = together[at].clone();
            }
            _ => break,
        }
    }
    Ok(Some(best))
}

/// Multiplications of one pass with so many candidates.
fn work(source: &Source, spec: &Spec, candidates: usize) -> u64 {
    let all: u64 = source
        .tensors
        .iter()
        .filter(|(name, _)| name.starts_with("model.layers."))
        .map(|(_, w)| w.shape().iter().product::<usize>() as u64)
        .sum();
    let head = (spec.vocab * spec.hidden) as u64;
    candidates as u64 * (all / 2 + head)
}

/// Sets of `top_k` of `count` experts with their weights, `[count]` each.
fn choices(count: usize, top_k: usize, shares: &[f32]) -> Vec<Vec<f32>> {
    let mut sets: Vec<Vec<usize>> = vec![Vec::new()];
    for _ in 0..top_k {
        sets = sets
            .iter()
            .flat_map(|s| {
                let from = s.last().map_or(0, |l| l + 1);
                (from..count).map(move |e| s.iter().copied().chain([e]).collect())
            })
            .take(100_000)
            .collect();
    }
    let step = sets.len().div_ceil(MOST_SETS).max(1);
    sets.into_iter()
        .step_by(step)
        .flat_map(|set| {
            let even = 1.0 / set.len() as f32;
            let shares = if set.len() == 2 { shares } else { &shares[..1] };
            shares.iter().map(move |&share| {
                let mut weights = vec![0.0; count];
                match set[..] {
                    [a, b] => (weights[a], weights[b]) = (share, 1.0 - share),
                    _ => set.iter().for_each(|&e| weights[e] = even),
                }
                weights
            })
        })
        .collect()
}

struct Search<'a> {
    weights: Weights,
    spec: &'a Spec,
    token: u32,
}

impl Search<'_> {
    /// Log-probabilities of the next token under each expert alone.
    fn alone(&self, experts: &[usize]) -> Result<Vec<Vec<f32>>, ModelError> {
        let one = |e: usize| -> FirstToken {
            self.spec
                .moe_layers()
                .map(|(l, m)| (l, (0..m.experts).map(|i| f32::from(i == e)).collect()))
                .collect()
        };
        let all: Vec<FirstToken> = experts.iter().map(|&e| one(e)).collect();
        let stream = self.through(&all)?;
        self.predictions(&stream)
    }

    /// The value of each routing.
    fn values(&self, all: &[FirstToken], targets: &[Vec<f32>]) -> Result<Vec<f64>, ModelError> {
        let stream = self.through(all)?;
        let predicted = self.predictions(&stream)?;
        Ok(predicted.iter().map(|p| divergence(targets, p)).collect())
    }

    /// All routings side by side through all layers.
    fn through(&self, all: &[FirstToken]) -> Result<Tensor, ModelError> {
        let mut x = self.start(all.len())?;
        for l in 0..self.spec.layers.len() {
            let layer = Layer::load(&self.weights, self.spec, l)?;
            let rows: Vec<&[f32]> =
                all.iter().map(|f| f.get(&l).map_or(&[][..], Vec::as_slice)).collect();
            x = self.pass(&layer, &x, &rows)?;
            self.weights.release(&format!("model.layers.{l}."));
        }
        Ok(x)
    }

    /// The value of every choice in every MoE layer, the other layers being as in `now`. A candidate joins the pass in
    /// its own layer: below it is like all others.
    fn each_layer(
        &self,
        now: &FirstToken,
        choices: &[Vec<f32>],
        targets: &[Vec<f32>],
    ) -> Result<BTreeMap<usize, Vec<f64>>, ModelError> {
        let mut x = self.start(1)?; // row 0: `now`
        let mut joined = Vec::new();
        for l in 0..self.spec.layers.len() {
            let layer = Layer::load(&self.weights, self.spec, l)?;
            let own = now.get(&l);
            let mut rows: Vec<&[f32]> = vec![own.map_or(&[][..], Vec::as_slice); x.dim(0)?];
            if own.is_some() {
                let first = x.narrow(0, 0, 1)?;
                let copies = first.broadcast_as((choices.len(), self.spec.hidden))?;
                x = Tensor::cat(&[&x, &copies.contiguous()?], 0)?;
                rows.extend(choices.iter().map(Vec::as_slice));
                joined.push(l);
            }
            x = self.pass(&layer, &x, &rows)?;
            self.weights.release(&format!("model.layers.{l}."));
        }
        let predicted = self.predictions(&x)?;
        let mut values = predicted[1..].iter().map(|p| divergence(targets, p));
        Ok(joined.into_iter().map(|l| (l, values.by_ref().take(choices.len()).collect())).collect())
    }

    fn start(&self, count: usize) -> Result<Tensor, ModelError> {
        let embedding = self.weights.stored("model.embed_tokens.weight")?;
        embed(self.spec, &embedding, &vec![self.token; count])
    }

    /// Through one layer, each row a text of its own with the given weights.
    fn pass(&self, layer: &Layer, x: &Tensor, rows: &[&[f32]]) -> Result<Tensor, ModelError> {
        let count = rows.len();
        let sequences: Vec<_> = (0..count).map(|i| i..i + 1).collect();
        let positions = vec![0; count];
        let mut tables = Tables::new(&positions);
        let table = tables.of(layer.rope());
        let (x, mlp_input) = layer.attended(self.spec, x, table, Past::None(&sequences))?;
        let Some((moe, _)) = layer.router() else {
            return Ok(layer.fed(self.spec, &x, mlp_input, Gating::Stored)?.stream);
        };
        let top_k = rows.iter().map(|r| r.iter().filter(|w| **w > 0.0).count()).max().unwrap_or(1);
        let mut routing = Routing { tokens: count, top_k, ids: Vec::new(), weights: Vec::new() };
        for row in rows {
            let mut chosen: Vec<u32> =
                (0..row.len() as u32).filter(|&e| row[e as usize] > 0.0).collect();
            // Experts without weight fill the places: every token has as many.
            chosen.extend((0..row.len() as u32).filter(|&e| row[e as usize] == 0.0));
            chosen.truncate(top_k);
            routing.weights.extend(chosen.iter().map(|&e| row[e as usize] * moe.router.scale));
            routing.ids.extend(chosen);
        }
        Ok(layer.fed(self.spec, &x, mlp_input, Gating::Given(&routing))?.stream)
    }

    /// Log-probabilities of the next token, row by row.
    fn predictions(&self, stream: &Tensor) -> Result<Vec<Vec<f32>>, ModelError> {
        let last = norm(&self.weights, self.spec, "model.norm.weight")?;
        let name = if self.spec.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let head = FrozenLinear::new(self.weights.stored(name)?, None);
        let logits = to_vec(&head.forward(&last.forward(stream)?)?)?;
        Ok(logits
            .chunks_exact(self.spec.vocab)
            .map(|row| {
                let mut row = row.to_vec();
                self.spec.finish_logits(&mut row);
                let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|&v| f64::from(v - top).exp()).sum();
                let total = top + sum.ln() as f32;
                row.iter_mut().for_each(|v| *v -= total);
                row
            })
            .collect())
    }
}

/// Mean of `KL(target || predicted)` in nats.
fn divergence(targets: &[Vec<f32>], predicted: &[f32]) -> f64 {
    let one = |target: &Vec<f32>| -> f64 {
        let pairs = target.iter().zip(predicted);
        pairs.map(|(&t, &p)| f64::from(t).exp() * f64::from(t - p)).sum()
    };
    targets.iter().map(one).sum::<f64>() / targets.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_sets_with_weights_that_sum_to_one() {
        let all = choices(4, 2, &SHARES);
        assert_eq!(all.len(), 6 * 5);
        assert!(all.iter().all(|w| (w.iter().sum::<f32>() - 1.0).abs() < 1e-6));
        assert_eq!(choices(4, 1, &SHARES).len(), 4);
        assert_eq!(choices(4, 3, &SHARES)[0], [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0]);
        assert!(choices(64, 8, &SHARES).len() <= MOST_SETS);
    }

    #[test]
    fn divergence_is_zero_for_the_same_and_by_hand_otherwise() {
        let ln = |p: [f32; 2]| p.map(f32::ln).to_vec();
        let (even, odd) = (ln([0.5, 0.5]), ln([0.25, 0.75]));
        assert!(divergence(&[even.clone()], &even).abs() < 1e-7);
        let expected = 0.5 * (2f64).ln() + 0.5 * (2.0f64 / 3.0).ln();
        assert!((divergence(&[even.clone(), even], &odd) - expected).abs() < 1e-6);
    }
}

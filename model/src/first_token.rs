//! Where the token goes that every text begins with.
//!
//! The beginning-of-text token says nothing about the text, so in every layer its experts are one fixed choice. What
//! follows it is predicted by that choice alone: a wrong expert costs more there than anywhere else.

use std::collections::BTreeMap;

use candle_core::Tensor;
use moe_merge_checkpoint::Source;
use moe_merge_kernels::{Exec, LogSumExp, MatView, Routing, linear};

use crate::error::ModelError;
use crate::layer::{Gating, Layer, Past, norm};
use crate::model::{Tables, embed};
use crate::ops::to_vec;
use crate::spec::Spec;
use crate::streamed::{HEAD_ROWS, head_block};
use crate::weights::Weights;

/// Sets of experts tried in a layer; with more experts than make so many, the ones that differ most in number.
const MOST_SETS: usize = 36;

/// Shares of the first of two experts.
const SHARES: [f32; 5] = [0.5, 0.1, 0.3, 0.7, 0.9];

/// Multiplications that a search may take; with a larger model there are fewer rounds, then only equal shares, then no search.
const MOST_WORK: u64 = 200_000_000_000;

/// Times that all layers are tried, at most.
const ROUNDS: u64 = 12;

/// For each MoE layer, how much weight each expert gets from the first token.
pub type FirstToken = BTreeMap<usize, Vec<f32>>;

/// The routing of `token` at the beginning of a text under which the model's prediction of the next token is nearest to
/// those of the `experts`: lowest mean of `KL(expert alone || mixture)` over them.
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
    let target = search.alone(experts)?;
    // Everything open: no choice of so few experts can be judged without a start.
    let mut best: FirstToken = moe.iter().map(|m| (m.0, vec![1.0 / count as f32; count])).collect();
    let mut value = f64::INFINITY;
    let rounds = (MOST_WORK / work(source, &spec, moe.len() * choices.len()).max(1)).min(ROUNDS);
    for round in 0..rounds {
        let tried = search.each_layer(&best, &choices, &target)?;
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
        let values = search.values(&together, &target)?;
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

/// Multiplications of one round with so many candidates.
fn work(source: &Source, spec: &Spec, candidates: usize) -> u64 {
    /// What it takes to compute a number that is not stored, in multiplications; twice a round.
    const COMPUTED: u64 = 100;
    let (mut all, mut computed) = (0, 0);
    for (_, weight) in source.tensors.iter().filter(|(name, _)| name.starts_with("model.layers.")) {
        let numbers = weight.shape().iter().product::<usize>() as u64;
        all += numbers;
        computed += if weight.bytes().is_none() { numbers } else { 0 };
    }
    let head = (spec.vocab * spec.hidden) as u64;
    candidates as u64 * (all / 2 + head) + COMPUTED * computed
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
    /// Probabilities of the next token, mean over the experts, each alone.
    fn alone(&self, experts: &[usize]) -> Result<Vec<f32>, ModelError> {
        let one = |e: usize| -> FirstToken {
            self.spec
                .moe_layers()
                .map(|(l, m)| (l, (0..m.experts).map(|i| f32::from(i == e)).collect()))
                .collect()
        };
        let all: Vec<FirstToken> = experts.iter().map(|&e| one(e)).collect();
        let stream = self.through(&all)?;
        self.mean_prediction(&stream)
    }

    /// The value of each routing.
    fn values(&self, all: &[FirstToken], target: &[f32]) -> Result<Vec<f64>, ModelError> {
        self.surprise(&self.through(all)?, target)
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
        target: &[f32],
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
        let mut values = self.surprise(&x, target)?.into_iter().skip(1);
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

    /// Shows `see` the logits of every row for one block of the vocabulary after the other: first token of the block, and
    /// `[rows, block]`.
    fn logits(
        &self,
        stream: &Tensor,
        mut see: impl FnMut(usize, &[f32], usize),
    ) -> Result<(), ModelError> {
        let last = norm(&self.weights, self.spec, "model.norm.weight")?;
        let x = to_vec(&last.forward(stream)?)?;
        let rows = x.len() / self.spec.hidden;
        let name = if self.spec.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let head = self.weights.stored(name)?;
        let mut logits = Vec::new();
        for from in (0..self.spec.vocab).step_by(HEAD_ROWS) {
            let to = self.spec.vocab.min(from + HEAD_ROWS);
            let (bytes, dtype) = head_block(&head, from, to)?;
            let block = MatView::new(&bytes, dtype, to - from, self.spec.hidden)?;
            logits.resize(rows * (to - from), 0.0);
            linear(&x, block, None, &mut logits, &Exec::default())?;
            self.spec.finish_logits(&mut logits);
            see(from, &logits, to - from);
        }
        head.release();
        Ok(())
    }

    /// Mean over the rows of the probabilities of the next token, `[vocab]`.
    fn mean_prediction(&self, stream: &Tensor) -> Result<Vec<f32>, ModelError> {
        let mut all: Vec<Vec<f32>> = vec![vec![0.0; self.spec.vocab]; stream.dim(0)?];
        self.logits(stream, |from, logits, width| {
            for (row, block) in all.iter_mut().zip(logits.chunks_exact(width)) {
                row[from..from + width].copy_from_slice(block);
            }
        })?;
        let mut mean = vec![0.0; self.spec.vocab];
        let count = all.len() as f64;
        for row in &all {
            let mut total = LogSumExp::default();
            total.add(row);
            let total = total.value();
            let pairs = mean.iter_mut().zip(row);
            pairs.for_each(|(m, &l)| *m += ((f64::from(l) - total).exp() / count) as f32);
        }
        Ok(mean)
    }

    /// Cross entropy of each row's prediction with `target`, in nats: the divergence up to what all rows have in common.
    fn surprise(&self, stream: &Tensor, target: &[f32]) -> Result<Vec<f64>, ModelError> {
        let rows = stream.dim(0)?;
        let (mut totals, mut own) = (vec![LogSumExp::default(); rows], vec![0f64; rows]);
        self.logits(stream, |from, logits, width| {
            let target = &target[from..from + width];
            for ((row, total), own) in logits.chunks_exact(width).zip(&mut totals).zip(&mut own) {
                total.add(row);
                let pairs = row.iter().zip(target);
                *own += pairs.map(|(&l, &t)| f64::from(l) * f64::from(t)).sum::<f64>();
            }
        })?;
        Ok(totals.iter().zip(own).map(|(total, own)| total.value() - own).collect())
    }
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
}

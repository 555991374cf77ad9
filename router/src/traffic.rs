//! Where the tokens of texts went: load, entropy, runners-up and agreement with labels, from choices and probabilities.

use std::collections::{BTreeMap, BTreeSet};

/// What one router did with tokens that stand one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Choices<'a> {
    /// Routed experts in the layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// `[tokens, top_k]`, best first.
    pub ids: &'a [u32],
    /// `[tokens, top_k]`, of the same places.
    pub weights: &'a [f32],
    /// `[tokens, experts]`, rows of sum 1.
    pub probabilities: &'a [f32],
    /// Tokens of the text that the model saw before the first of these.
    pub position: usize,
}

/// Counts of one text, over any number of layers.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    label: Option<usize>,
    layers: BTreeMap<usize, Counts>,
    /// `[experts, experts]`: how often the column was second choice where the row was first, all layers together.
    second: Vec<u64>,
    /// Routed experts, the most of all layers.
    experts: usize,
    /// Per [`bucket`], all layers together.
    positions: Vec<Hits>,
}

#[derive(Debug, Clone, Default)]
struct Counts {
    slots: Vec<u64>,
    first: Vec<u64>,
    weight: Vec<f64>,
    entropy: f64,
    hits: Hits,
}

/// How often a labelled expert was chosen.
#[derive(Debug, Clone, Copy, Default)]
struct Hits {
    tokens: u64,
    first: u64,
    any: u64,
}

impl Hits {
    fn add(&mut self, other: Hits) {
        self.tokens += other.tokens;
        self.first += other.first;
        self.any += other.any;
    }

    fn agreement(self) -> Agreement {
        Agreement { first: share(self.first, self.tokens), any: share(self.any, self.tokens) }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// Positions are counted in ranges that double: 0, 1, 2-3, 4-7, 8-15, …
fn bucket(position: usize) -> usize {
    position.checked_ilog2().map_or(0, |power| power as usize + 1)
}

/// Adds the weights of one token as shares of their sum.
fn add_shares(sums: &mut [f64], chosen: &[u32], weights: &[f32]) {
    let all: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    for (&expert, &weight) in chosen.iter().zip(weights) {
        if let Some(sum) = sums.get_mut(expert as usize).filter(|_| all > 0.0) {
            *sum += f64::from(weight) / all;
        }
    }
}

/// Entropy in nats of one row of probabilities.
fn entropy(row: &[f32]) -> f64 {
    row.iter().map(|&p| f64::from(p)).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum()
}

/// The likeliest expert but `first`; the lowest of equals.
fn runner_up(row: &[f32], first: usize) -> Option<usize> {
    let others = (0..row.len()).filter(|&e| e != first);
    others.reduce(|best, e| if row[e] > row[best] { e } else { best })
}

impl Traffic {
    /// Nothing counted yet; `label` is the expert that the text belongs to, where that is known.
    pub fn new(label: Option<usize>) -> Self {
        Self { label, ..Self::default() }
    }

    /// Counts what the router of `layer` did. Choices of experts that are not there are left out.
    pub fn add(&mut self, layer: usize, choices: Choices<'_>) {
        let Choices { experts, top_k, ids, weights, probabilities, position } = choices;
        if experts > self.experts {
            self.widen(experts);
        }
        let counts = self.layers.entry(layer).or_default();
        counts.slots.resize(experts, 0);
        counts.first.resize(experts, 0);
        counts.weight.resize(experts, 0.0);
        let rows = ids.chunks_exact(top_k.max(1)).zip(probabilities.chunks_exact(experts.max(1)));
        for (i, (chosen, row)) in rows.enumerate() {
            let known = || chosen.iter().map(|&e| e as usize).filter(|&e| e < experts);
            let Some(first) = known().next() else { continue };
            known().for_each(|e| counts.slots[e] += 1);
            let own = weights.get(i * top_k..(i + 1) * top_k).unwrap_or_default();
            add_shares(&mut counts.weight, chosen, own);
            counts.first[first] += 1;
            counts.entropy += entropy(row);
            if let Some(second) = runner_up(row, first) {
                self.second[first * self.experts + second] += 1;
            }
            let hit = |yes: bool| u64::from(yes);
            let label = self.label;
            let hits = Hits {
                tokens: 1,
                first: hit(label == Some(first)),
                any: hit(label.is_some_and(|l| known().any(|e| e == l))),
            };
            counts.hits.add(hits);
            let at = bucket(position + i);
            if at >= self.positions.len() {
                self.positions.resize(at + 1, Hits::default());
            }
            self.positions[at].add(hits);
        }
    }

    fn widen(&mut self, experts: usize) {
        let mut second = vec![0; experts * experts];
        for a in 0..self.experts {
            let row = &self.second[a * self.experts..(a + 1) * self.experts];
            second[a * experts..a * experts + self.experts].copy_from_slice(row);
        }
        (self.second, self.experts) = (second, experts);
    }

    /// The figures.
    pub fn report(&self) -> TextTraffic {
        let layers: Vec<LayerTraffic> = self
            .layers
            .iter()
            .map(|(&layer, c)| {
                let slots = c.slots.iter().sum();
                LayerTraffic {
                    layer,
                    load: c.slots.iter().map(|&n| share(n, slots)).collect(),
                    first: c.first.iter().map(|&n| share(n, c.hits.tokens)).collect(),
                    weight: c.weight.iter().map(|w| w / c.hits.tokens.max(1) as f64).collect(),
                    entropy: c.entropy / c.hits.tokens.max(1) as f64,
                    agreement: self.label.map(|_| c.hits.agreement()),
                }
            })
            .collect();
        let mean = |of: &dyn Fn(&LayerTraffic) -> f64| {
            layers.iter().map(of).sum::<f64>() / layers.len().max(1) as f64
        };
        let each = |of: &dyn Fn(&LayerTraffic) -> &[f64]| -> Vec<f64> {
            let at = |e: usize| mean(&|l| of(l).get(e).copied().unwrap_or(0.0));
            (0..self.experts).map(at).collect()
        };
        let pooled = self.layers.len().max(1) as u64;
        TextTraffic {
            tokens: self.layers.values().map(|c| c.hits.tokens).max().unwrap_or(0) as usize,
            load: each(&|l| &l.load),
            first: each(&|l| &l.first),
            weight: each(&|l| &l.weight),
            entropy: mean(&|l| l.entropy),
            rivals: (0..self.experts).map(|e| self.rival(e)).collect(),
            agreement: self.label.map(|_| self.hits().agreement()),
            positions: self
                .positions()
                .filter(|_| self.label.is_some())
                .map(|(from, to, h)| {
                    let tokens = (h.tokens / pooled) as usize;
                    PositionAgreement { from, to, tokens, agreement: h.agreement() }
                })
                .collect(),
            layers,
        }
    }

    fn hits(&self) -> Hits {
        let mut all = Hits::default();
        self.layers.values().for_each(|c| all.add(c.hits));
        all
    }

    fn positions(&self) -> impl Iterator<Item = (usize, usize, Hits)> + '_ {
        self.positions.iter().enumerate().filter(|(_, h)| h.tokens > 0).map(|(i, h)| match i {
            0 => (0, 0, *h),
            _ => (1 << (i - 1), (1 << i) - 1, *h),
        })
    }

    fn rival(&self, expert: usize) -> Option<Rival> {
        let row = &self.second[expert * self.experts..(expert + 1) * self.experts];
        most(row).map(|(other, share)| Rival { expert: other, share })
    }
}

/// The largest of the counts, the first of equals, as a share of all; none if all are zero.
fn most(counts: &[u64]) -> Option<(usize, f64)> {
    let all: u64 = counts.iter().sum();
    let best = (0..counts.len()).reduce(|b, e| if counts[e] > counts[b] { e } else { b })?;
    (all > 0).then(|| (best, share(counts[best], all)))
}

/// Where the tokens of one text went.
#[derive(Debug, Clone, PartialEq)]
pub struct TextTraffic {
    /// Its tokens.
    pub tokens: usize,
    /// Share of the top-k places that each expert gets, mean over layers; sums to 1.
    pub load: Vec<f64>,
    /// Share of tokens whose first choice each expert is, mean over layers; sums to 1.
    pub first: Vec<f64>,
    /// Share of the routing weight that each expert gets, mean over tokens and layers.
    pub weight: Vec<f64>,
    /// Entropy of the probabilities over all experts in nats, mean over tokens and layers: `ln experts` is undecided.
    pub entropy: f64,
    /// For each expert the one that is most often second where it is first; none for an expert that is never first.
    pub rivals: Vec<Option<Rival>>,
    /// How often the text's own expert was chosen; none without a label.
    pub agreement: Option<Agreement>,
    /// The same by position in the window, all layers together; empty without a label.
    pub positions: Vec<PositionAgreement>,
    /// The same figures layer by layer, in order.
    pub layers: Vec<LayerTraffic>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTraffic {
    /// Its number.
    pub layer: usize,
    /// Share of the top-k places per expert.
    pub load: Vec<f64>,
    /// Share of first choices per expert.
    pub first: Vec<f64>,
    /// Share of the routing weight per expert.
    pub weight: Vec<f64>,
    /// Mean entropy in nats.
    pub entropy: f64,
    /// How often the text's own expert was chosen; none without a label.
    pub agreement: Option<Agreement>,
}

/// How often the labelled expert was chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    /// Share of tokens with it as first choice.
    pub first: f64,
    /// Share of tokens with it among their top-k.
    pub any: f64,
}

/// Agreement of the tokens at some positions of a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PositionAgreement {
    /// First position, counted from 0.
    pub from: usize,
    /// Last position.
    pub to: usize,
    /// Tokens at these positions.
    pub tokens: usize,
    /// How often the labelled expert was chosen.
    pub agreement: Agreement,
}

/// An expert that competes with another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rival {
    /// The competitor.
    pub expert: usize,
    /// Its share.
    pub share: f64,
}

/// How well the routing of labelled texts agrees with their labels.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The experts that texts were labelled with, in order.
    pub experts: Vec<ExpertVerdict>,
    /// Every layer, in order.
    pub layers: Vec<LayerVerdict>,
    /// First choices that would be right without knowing anything: one in the labels, or one in the experts where all texts
    /// have the same label.
    pub chance: f64,
}

/// One labelled expert.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertVerdict {
    /// The expert.
    pub expert: usize,
    /// Tokens labelled with it.
    pub tokens: usize,
    /// How often it was chosen for them, mean over layers.
    pub agreement: Agreement,
    /// The expert that got most of them as first choice instead, and the share that it got.
    pub rival: Option<Rival>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerVerdict {
    /// Its number.
    pub layer: usize,
    /// Mean over the labelled experts.
    pub agreement: Agreement,
    /// Whether first choices are right more often than chance, by two standard errors of as many guesses or by 0.1.
    pub better_than_chance: bool,
}

/// Judges all labelled texts together; none if no text has a label.
pub fn judge(texts: &[Traffic]) -> Option<Verdict> {
    let labels: BTreeSet<usize> = texts.iter().filter_map(|t| t.label).collect();
    let of = |label: usize| texts.iter().filter(move |t| t.label == Some(label));
    let experts = texts.iter().filter(|t| t.label.is_some()).map(|t| t.experts).max()?;
    let chance = 1.0 / if labels.len() > 1 { labels.len() } else { experts.max(1) } as f64;
    let layers: BTreeSet<usize> = texts.iter().flat_map(|t| t.layers.keys().copied()).collect();
    let layer = |layer: usize| {
        let (mut agreement, mut tokens) = (Agreement { first: 0.0, any: 0.0 }, 0);
        for &label in &labels {
            let mut hits = Hits::default();
            of(label).filter_map(|t| t.layers.get(&layer)).for_each(|c| hits.add(c.hits));
            let own = hits.agreement();
            agreement.first += own.first / labels.len() as f64;
            agreement.any += own.any / labels.len() as f64;
            tokens += hits.tokens;
        }
        let error = (chance * (1.0 - chance) / tokens.max(1) as f64).sqrt();
        // A handful of tokens proves nothing: then the figure itself must look like chance.
        let margin = (2.0 * error).min(0.1);
        LayerVerdict { layer, agreement, better_than_chance: agreement.first > chance + margin }
    };
    Some(Verdict {
        experts: labels.iter().map(|&e| expert_verdict(e, of(e), experts)).collect(),
        layers: layers.into_iter().map(layer).collect(),
        chance,
    })
}

fn expert_verdict<'a>(
    expert: usize,
    texts: impl Iterator<Item = &'a Traffic>,
    experts: usize,
) -> ExpertVerdict {
    let (mut hits, mut tokens) = (Hits::default(), 0);
    let mut first = vec![0u64; experts];
    for text in texts {
        hits.add(text.hits());
        tokens += text.report().tokens;
        for counts in text.layers.values() {
            counts.first.iter().zip(&mut first).for_each(|(n, sum)| *sum += n);
        }
    }
    let all: u64 = first.iter().sum();
    if let Some(own) = first.get_mut(expert) {
        *own = 0;
    }
    let rival =
        most(&first).map(|(other, _)| Rival { expert: other, share: share(first[other], all) });
    ExpertVerdict { expert, tokens, agreement: hits.agreement(), rival }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first choice always has three quarters.
    static WEIGHTS: std::sync::LazyLock<Vec<f32>> =
        std::sync::LazyLock::new(|| [0.75, 0.25].repeat(40));

    fn choices<'a>(ids: &'a [u32], probabilities: &'a [f32], position: usize) -> Choices<'a> {
        let weights = &WEIGHTS[..ids.len()];
        Choices { experts: 3, top_k: 2, ids, weights, probabilities, position }
    }

    fn two_layers(label: Option<usize>) -> Traffic {
        let mut traffic = Traffic::new(label);
        let rows = [0.5, 0.5, 0.0, 0.2, 0.6, 0.2];
        traffic.add(4, choices(&[0, 1, 1, 0], &rows, 0));
        let rows = [1.0, 0.0, 0.0, 0.1, 0.2, 0.7];
        traffic.add(7, choices(&[0, 1, 2, 1], &rows, 0));
        traffic
    }

    #[test]
    fn loads_and_entropies_by_hand() {
        let report = two_layers(None).report();
        assert_eq!(report.tokens, 2);
        assert_eq!(report.layers[0].load, [0.5, 0.5, 0.0]);
        assert_eq!(report.layers[1].load, [0.25, 0.5, 0.25]);
        assert_eq!(report.load, [0.375, 0.5, 0.125]);
        assert_eq!(report.first, [0.5, 0.25, 0.25]);
        // Weights 3/4 and 1/4 each: in layer 7, expert 0 has 3/4 of the first token, 1 has 1/4 of both.
        assert_eq!(report.layers[0].weight, [0.5, 0.5, 0.0]);
        assert_eq!(report.layers[1].weight, [0.375, 0.25, 0.375]);
        assert_eq!(report.weight, [0.4375, 0.375, 0.1875]);
        let second: f64 = -(0.4 * 0.2f64.ln() + 0.6 * 0.6f64.ln());
        assert!((report.layers[0].entropy - (2f64.ln() + second) / 2.0).abs() < 1e-7);
        assert_eq!((report.agreement, report.positions.len()), (None, 0));
        // First choice 0 twice, with 1 second both times: in layer 7 as the lowest of equals.
        assert_eq!(report.rivals[0], Some(Rival { expert: 1, share: 1.0 }));
        assert_eq!(report.rivals[1], Some(Rival { expert: 0, share: 1.0 }));
        assert_eq!(report.rivals[2], Some(Rival { expert: 1, share: 1.0 }));
    }

    #[test]
    fn agreement_by_layer_and_position() {
        let report = two_layers(Some(0)).report();
        assert_eq!(report.agreement, Some(Agreement { first: 0.5, any: 0.75 }));
        assert_eq!(report.layers[1].agreement, Some(Agreement { first: 0.5, any: 0.5 }));
        let positions: Vec<_> =
            report.positions.iter().map(|p| (p.from, p.to, p.tokens, p.agreement.first)).collect();
        assert_eq!(positions, [(0, 0, 1, 1.0), (1, 1, 1, 0.0)]);
        assert_eq!([0, 1, 2, 3, 4, 7, 8].map(bucket), [0, 1, 2, 2, 3, 3, 4]);
    }

    #[test]
    fn layers_that_ignore_the_text_are_found() {
        let rows = [0.4, 0.3, 0.3].repeat(40);
        let mut texts = [Traffic::new(Some(0)), Traffic::new(Some(1))];
        for (e, text) in texts.iter_mut().enumerate() {
            // Layer 0 always takes expert 0; layer 1 takes the right one.
            text.add(0, choices(&[0, 1].repeat(40), &rows, 0));
            text.add(1, choices(&[e as u32, 2].repeat(40), &rows, 0));
        }
        let verdict = judge(&texts).unwrap();
        assert_eq!(verdict.chance, 0.5);
        let better: Vec<_> = verdict.layers.iter().map(|l| l.better_than_chance).collect();
        assert_eq!(better, [false, true]);
        assert_eq!(verdict.layers[0].agreement, Agreement { first: 0.5, any: 1.0 });
        assert_eq!(verdict.experts[1].agreement, Agreement { first: 0.5, any: 1.0 });
        assert_eq!(verdict.experts[1].rival, Some(Rival { expert: 0, share: 0.5 }));
        assert_eq!((verdict.experts[0].rival, verdict.experts[0].tokens), (None, 40));
        assert!(judge(&[Traffic::new(None)]).is_none());
    }

    #[test]
    fn experts_may_differ_from_layer_to_layer() {
        let mut traffic = Traffic::new(None);
        let few = Choices {
            experts: 2,
            top_k: 1,
            ids: &[1],
            weights: &[1.0],
            probabilities: &[0.4, 0.6],
            position: 0,
        };
        traffic.add(0, few);
        traffic.add(1, choices(&[2, 0], &[0.2, 0.1, 0.7], 0));
        let report = traffic.report();
        assert_eq!(report.first, [0.0, 0.5, 0.5]);
        assert_eq!(report.rivals[1], Some(Rival { expert: 0, share: 1.0 }));
        assert_eq!(report.rivals[2], Some(Rival { expert: 0, share: 1.0 }));
    }
}

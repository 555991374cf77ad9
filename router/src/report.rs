//! How well gates route: figures over all layers, and what is worth a warning. Data only, nothing is printed.

use crate::gate::Gate;
use crate::samples::Fit;

/// `σ_max / σ_min` above which mergekit calls a gate degenerate.
pub const DEGENERATE: f64 = 5.0;
/// Overlap of two experts above which their domains count as indistinguishable; guessing between them gives 0.5.
pub const INDISTINGUISHABLE: f64 = 0.4;
/// A layer must beat knowing nothing (`ln experts`) by this many nats to count as better than chance.
const BETTER_BY: f64 = 0.01;

/// Routing quality of a model, on prompts its gates had not seen.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct RoutingReport {
    /// One entry per expert, in order.
    pub experts: Vec<ExpertQuality>,
    /// One entry per layer with a learned gate, in order.
    pub layers: Vec<LayerQuality>,
    /// Layers no better than chance, by the caller's numbers.
    pub chance_layers: Vec<usize>,
    /// Pairs of experts whose domains cannot be told apart.
    pub indistinguishable: Vec<Rivalry>,
    /// Mean over layers of the share of expert `a`'s tokens that go to `b` first: `[experts, experts]`.
    pub confusion: Vec<f64>,
}

/// What one expert gets, averaged over layers.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ExpertQuality {
    /// Held-out tokens per layer; zero if its only prompt was never held out.
    pub tokens: usize,
    /// Share of its own tokens that go to it first.
    pub accuracy: Option<f64>,
    /// Share of its own tokens that have it among their top-k.
    pub coverage: Option<f64>,
    /// Share of all top-k places it gets when every domain is as frequent.
    pub load: f64,
    /// The expert it is most often confused with; none without held-out tokens on both sides.
    pub rival: Option<Rivalry>,
}

/// Two experts and how much their domains overlap.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Rivalry {
    /// One of them.
    pub expert: usize,
    /// The other.
    pub other: usize,
    /// Share of the tokens routed within the pair that go to the wrong one: 0 apart, 0.5 indistinguishable.
    pub overlap: f64,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LayerQuality {
    /// The caller's number.
    pub layer: usize,
    /// Mean accuracy over experts.
    pub accuracy: f64,
    /// Held-out loss in nats.
    pub nll: f64,
    /// The L2 penalty chosen.
    pub penalty: f64,
    /// The temperature chosen.
    pub temperature: f64,
}

/// Summary of learned gates, `(layer, fit)` each; none if no layer has held-out figures.
///
/// All fits have the same number of experts; one that differs from the first is left out.
pub fn routing<'a>(fits: impl IntoIterator<Item = (usize, &'a Fit)>) -> Option<RoutingReport> {
    let known: Vec<_> =
        fits.into_iter().filter_map(|(l, f)| Some((l, f, f.held_out.as_ref()?))).collect();
    let experts = known.first()?.1.gate.experts;
    let known: Vec<_> = known.into_iter().filter(|k| k.1.gate.experts == experts).collect();
    let mean = |of: &dyn Fn(&crate::HeldOut) -> f64| {
        known.iter().map(|(_, _, h)| of(h)).sum::<f64>() / known.len() as f64
    };
    let confusion: Vec<f64> = (0..experts * experts).map(|i| mean(&|h| h.confusion[i])).collect();
    let tokens = &known[0].2.tokens;
    let quality = (0..experts)
        .map(|e| {
            let judged = tokens[e] > 0;
            ExpertQuality {
                tokens: tokens[e],
                accuracy: judged.then(|| mean(&|h| h.accuracy[e].unwrap_or(0.0))),
                coverage: judged.then(|| mean(&|h| h.coverage[e].unwrap_or(0.0))),
                load: mean(&|h| h.load[e]),
                rival: nearest_rival(&confusion, tokens, e),
            }
        })
        .collect();
    let layers: Vec<_> = known
        .iter()
        .map(|(layer, fit, h)| LayerQuality {
            layer: *layer,
            accuracy: h.mean_accuracy(),
            nll: h.nll,
            penalty: fit.penalty,
            temperature: fit.temperature,
        })
        .collect();
    // Chance among the experts that were judged: their tokens may go to any of all experts.
    let chance = 1.0 / experts as f64;
    let no_better =
        |l: &&LayerQuality| l.accuracy <= chance || l.nll >= (experts as f64).ln() - BETTER_BY;
    let chance_layers = layers.iter().filter(no_better).map(|l| l.layer).collect();
    Some(RoutingReport {
        experts: quality,
        chance_layers,
        indistinguishable: pairs(&confusion, tokens)
            .filter(|r| r.overlap >= INDISTINGUISHABLE)
            .collect(),
        layers,
        confusion,
    })
}

/// All pairs with held-out tokens on both sides.
fn pairs<'a>(confusion: &'a [f64], tokens: &'a [usize]) -> impl Iterator<Item = Rivalry> + 'a {
    let experts = tokens.len();
    (0..experts)
        .flat_map(move |a| (a + 1..experts).map(move |b| (a, b)))
        .filter(|&(a, b)| tokens[a] > 0 && tokens[b] > 0)
        .map(move |(a, b)| {
            let at = |x: usize, y: usize| confusion[x * experts + y];
            let wrong = at(a, b) + at(b, a);
            let all = wrong + at(a, a) + at(b, b);
            let overlap = if all > 0.0 { wrong / all } else { 0.0 };
            Rivalry { expert: a, other: b, overlap }
        })
}

fn nearest_rival(confusion: &[f64], tokens: &[usize], expert: usize) -> Option<Rivalry> {
    pairs(confusion, tokens)
        .filter(|r| r.expert == expert || r.other == expert)
        .map(|r| Rivalry { expert, other: r.expert + r.other - expert, ..r })
        .reduce(|best, r| if r.overlap > best.overlap { r } else { best })
}

/// A layer whose gate rows point nearly the same way.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct DegenerateGate {
    /// The caller's number.
    pub layer: usize,
    /// `σ_max / σ_min`; infinite when rows are dependent.
    pub condition: f64,
}

/// Layers of a mergekit mode whose `σ_max / σ_min` exceeds [`DEGENERATE`]; give it prompted shared experts' rows, too.
///
/// Not for learned gates: their rows sum to zero, so they are dependent by construction.
///
/// # Source
/// mergekit `moe/router.py::warn_degenerate_gates`.
pub fn degenerate<'a>(gates: impl IntoIterator<Item = (usize, &'a Gate)>) -> Vec<DegenerateGate> {
    gates
        .into_iter()
        .map(|(layer, gate)| DegenerateGate { layer, condition: gate.condition() })
        .filter(|g| g.condition > DEGENERATE)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HeldOut;

    fn fit(confusion: [f64; 9], nll: f64) -> Fit {
        let accuracy = (0..3).map(|e| Some(confusion[e * 4])).collect();
        Fit {
            gate: Gate { experts: 3, hidden: 1, rows: vec![0.0; 3] },
            held_out: Some(HeldOut {
                folds: 2,
                top_k: 2,
                tokens: vec![10, 20, 30],
                nll,
                accuracy,
                coverage: vec![Some(1.0), Some(0.9), Some(0.8)],
                confusion: confusion.to_vec(),
                load: vec![0.3, 0.3, 0.4],
            }),
            penalty: 0.01,
            temperature: 1.0,
            input_rms: 1.0,
            iterations: 1,
            warnings: Vec::new(),
        }
    }

    #[test]
    fn means_rivals_and_chance_by_hand() {
        let good = fit([0.8, 0.2, 0.0, 0.4, 0.6, 0.0, 0.0, 0.1, 0.9], 0.5);
        let bad = fit([0.4, 0.4, 0.2, 0.4, 0.4, 0.2, 0.2, 0.5, 0.3], 1.099);
        let report = routing([(3, &good), (5, &bad)]).unwrap();
        assert_eq!(report.chance_layers, [5]);
        let expert = &report.experts[0];
        assert!((expert.accuracy.unwrap() - 0.6).abs() < 1e-12);
        assert_eq!((expert.tokens, expert.coverage), (10, Some(1.0)));
        // Experts 0 and 1: wrong (0.2+0.4)/2 + (0.4+0.4)/2 = 0.7, right 0.6 + 0.5.
        let rival = expert.rival.unwrap();
        assert_eq!((rival.expert, rival.other), (0, 1));
        assert!((rival.overlap - 0.7 / 1.8).abs() < 1e-12);
        assert_eq!(report.experts[1].rival.unwrap().other, 0);
        assert!(report.indistinguishable.is_empty());
        let report = routing([(5, &bad)]).unwrap();
        assert_eq!(report.indistinguishable.len(), 2);
        assert_eq!(report.indistinguishable[0].overlap, 0.5);
    }

    #[test]
    fn experts_that_were_never_held_out_have_no_figures() {
        let mut one = fit([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], 0.1);
        one.held_out.as_mut().unwrap().tokens[2] = 0;
        one.held_out.as_mut().unwrap().accuracy[2] = None;
        let report = routing([(0, &one)]).unwrap();
        assert_eq!((report.experts[2].accuracy, report.experts[2].rival), (None, None));
        assert_eq!(report.experts[0].rival.unwrap().other, 1);
        one.held_out = None;
        assert!(routing([(0, &one)]).is_none());
    }

    #[test]
    fn degenerate_layers_are_named() {
        let gate = |rows: [f32; 4]| Gate { experts: 2, hidden: 2, rows: rows.to_vec() };
        // Cosine 0.8 gives 3, cosine 0.96 gives 7.
        let (fine, close) = (gate([1.0, 0.0, 0.8, 0.6]), gate([1.0, 0.0, 0.96, 0.28]));
        let found = degenerate([(0, &fine), (1, &close)]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].layer, 1);
        assert!((found[0].condition - 7.0).abs() < 1e-5);
    }
}

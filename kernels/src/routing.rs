//! Which experts a token visits, and with what weight.

use crate::activation::sigmoid;
use crate::error::KernelError;
use crate::norm::softmax;

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Each expert's own logistic function.
    Sigmoid,
}

/// How exactly scores and weights are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// In f32.
    F32,
    /// In f32, rounded to bf16 where transformers 5 rounds when it runs a model in bf16, so that a token between two experts
    /// goes the same way.
    RoundLikeHf {
        /// Logits, before they become scores: they come out of a product in bf16.
        logits: bool,
        /// Weights, after they were divided by their sum and before `scale`.
        weights: bool,
    },
}

/// The rule of one router.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterSpec {
    /// Experts per token.
    pub top_k: usize,
    /// How logits become scores.
    pub score: Score,
    /// Whether the chosen scores are divided by their sum.
    pub renormalise: bool,
    /// Factor on the weights, after that.
    pub scale: f32,
    /// `(groups, kept)`: experts form `groups` groups of equal size; only those of the `kept` groups with the largest best
    /// score can be chosen (DeepSeek's group-limited greedy).
    pub groups: Option<(usize, usize)>,
    /// How exactly.
    pub precision: Precision,
}

impl RouterSpec {
    /// Softmax over all experts, the `top_k` best, weights divided by their sum: Mixtral.
    pub fn softmax(top_k: usize) -> Self {
        Self {
            top_k,
            score: Score::Softmax,
            renormalise: true,
            scale: 1.0,
            groups: None,
            precision: Precision::F32,
        }
    }

    /// Whether so many experts can be chosen from `experts`.
    pub(crate) fn check(&self, experts: usize) -> Result<(), KernelError> {
        let top_k = self.top_k;
        if top_k == 0 || top_k > experts {
            return Err(KernelError::TopK { top_k, experts });
        }
        if let Some((groups, kept)) = self.groups {
            let whole = groups > 0 && kept > 0 && kept <= groups && experts.is_multiple_of(groups);
            if !whole || kept * (experts / groups) < top_k {
                return Err(KernelError::TopK { top_k, experts: experts / groups.max(1) * kept });
            }
        }
        Ok(())
    }
}

/// The experts that tokens visit.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// Tokens routed.
    pub tokens: usize,
    /// Experts per token.
    pub top_k: usize,
    /// `[tokens, top_k]`, best first.
    pub ids: Vec<u32>,
    /// `[tokens, top_k]`, of the same slots.
    pub weights: Vec<f32>,
}

/// Chooses experts.
///
/// Scores are taken over all experts in f32; the `top_k` largest are kept, ties to the lower index, best first.
///
/// * `logits`: `[tokens, experts]`
/// * `bias`: `[experts]`, added to the scores for the choice only, not for the weights
///
/// # Errors
/// [`KernelError::NotFinite`] names the first bad logit; [`KernelError::TopK`], [`KernelError::Length`].
pub fn route(
    logits: &[f32],
    tokens: usize,
    experts: usize,
    bias: Option<&[f32]>,
    spec: &RouterSpec,
) -> Result<Routing, KernelError> {
    let top_k = spec.top_k;
    spec.check(experts)?;
    KernelError::check("router logits", tokens * experts, logits.len())?;
    if let Some(bias) = bias {
        KernelError::check("router bias", experts, bias.len())?;
    }
    if let Some(bad) = logits.iter().position(|v| !v.is_finite()) {
        return Err(KernelError::NotFinite { token: bad / experts, expert: bad % experts });
    }
    let mut routing = Routing {
        tokens,
        top_k,
        ids: Vec::with_capacity(tokens * top_k),
        weights: Vec::with_capacity(tokens * top_k),
    };
    let (mut scores, mut choice) = (vec![0.0; experts], vec![0.0; experts]);
    let (round_logits, round_weights) = match spec.precision {
        Precision::F32 => (false, false),
        Precision::RoundLikeHf { logits, weights } => (logits, weights),
    };
    for row in logits.chunks_exact(experts) {
        scores.copy_from_slice(row);
        if round_logits {
            round_to_bf16(&mut scores);
        }
        match spec.score {
            Score::Softmax => softmax(&mut scores),
            Score::Sigmoid => scores.iter_mut().for_each(|s| *s = sigmoid(*s)),
        }
        choice.copy_from_slice(&scores);
        if let Some(bias) = bias {
            choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
        }
        if let Some((groups, kept)) = spec.groups {
            keep_groups(&mut choice, groups, kept);
        }
        let first = routing.ids.len();
        for _ in 0..top_k {
            let best = largest(&choice);
            choice[best] = f32::NEG_INFINITY;
            routing.ids.push(best as u32);
            routing.weights.push(scores[best]);
        }
        let weights = &mut routing.weights[first..];
        if spec.renormalise {
            let sum: f32 = weights.iter().sum::<f32>().max(f32::MIN_POSITIVE);
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        if round_weights {
            round_to_bf16(weights);
        }
        weights.iter_mut().for_each(|w| *w *= spec.scale);
    }
    Ok(routing)
}

/// As [`route`], but `expert` is among the chosen of every token: where it is not by itself, it takes the place of the last
/// one. Weights are as ever those of the chosen.
///
/// # Errors
/// As [`route`]; [`KernelError::Length`] if there is no such expert.
pub fn route_always(
    logits: &[f32],
    tokens: usize,
    experts: usize,
    bias: Option<&[f32]>,
    spec: &RouterSpec,
    expert: usize,
) -> Result<Routing, KernelError> {
    let mut bias = bias.map_or_else(|| vec![0.0; experts], <[f32]>::to_vec);
    let Some(own) = bias.get_mut(expert) else {
        let what = "experts, with the one that is always chosen";
        return Err(KernelError::Length { what, expected: expert + 1, found: experts });
    };
    // Above any score, with or without a bias; and finite, as a score has to be.
    *own = f32::MAX / 4.0;
    route(logits, tokens, experts, Some(&bias), spec)
}

/// To the nearest bf16, ties to even.
fn round_to_bf16(values: &mut [f32]) {
    values.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32());
}

/// Index of the largest value, the first one among equals.
fn largest(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best
}

/// Rules out all experts but those of the `kept` groups with the largest best score.
fn keep_groups(choice: &mut [f32], groups: usize, kept: usize) {
    let size = choice.len() / groups;
    let mut best: Vec<f32> = choice
        .chunks_exact(size)
        .map(|g| g.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v)))
        .collect();
    let mut keep = vec![false; groups];
    for _ in 0..kept {
        let group = largest(&best);
        best[group] = f32::NEG_INFINITY;
        keep[group] = true;
    }
    for (group, scores) in choice.chunks_exact_mut(size).enumerate() {
        if !keep[group] {
            scores.fill(f32::NEG_INFINITY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn weights_by_hand() {
        let logits = [1f32.ln(), 3f32.ln(), 4f32.ln()];
        let mut spec = RouterSpec { renormalise: false, ..RouterSpec::softmax(2) };
        let routing = route(&logits, 1, 3, None, &spec).unwrap();
        assert_eq!(routing.ids, [2, 1]);
        assert!(
            (routing.weights[0] - 0.5).abs() < 1e-6 && (routing.weights[1] - 0.375).abs() < 1e-6
        );
        spec.renormalise = true;
        spec.scale = 7.0;
        let routing = route(&logits, 1, 3, None, &spec).unwrap();
        assert!((routing.weights[0] - 4.0).abs() < 1e-5 && (routing.weights[1] - 3.0).abs() < 1e-5);
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        let routing = route(&[0.5; 5], 1, 5, None, &RouterSpec::softmax(3)).unwrap();
        assert_eq!(routing.ids, [0, 1, 2]);
    }

    #[test]
    fn bias_chooses_but_does_not_weigh() {
        let logits = [0.0, 0.0, 3f32.ln()];
        let bias = [0.0, 1.0, 0.0];
        let spec = RouterSpec { renormalise: false, ..RouterSpec::softmax(1) };
        let routing = route(&logits, 1, 3, Some(&bias), &spec).unwrap();
        assert_eq!(routing.ids, [1]);
        assert!((routing.weights[0] - 0.2).abs() < 1e-6);
    }

    #[test]
    fn an_expert_that_is_always_chosen_has_the_weight_it_would_have() {
        let logits = [1f32.ln(), 3f32.ln(), 4f32.ln()];
        let always = |expert, bias: Option<&[f32]>, spec: &RouterSpec| {
            let found = route_always(&logits, 1, 3, bias, spec, expert).unwrap();
            let weights = found.weights.iter().map(|w| (w * 1e5).round() / 1e5).collect::<Vec<_>>();
            (found.ids, weights)
        };
        let spec = RouterSpec::softmax(2);
        // Among the two best by itself: as ever; not among them: with the best one.
        assert_eq!(always(1, None, &spec), (vec![1, 2], vec![0.42857, 0.57143]));
        assert_eq!(always(0, None, &spec), (vec![0, 2], vec![0.2, 0.8]));
        assert_eq!(always(0, Some(&[0.0, 1.0, 0.0]), &spec), (vec![0, 1], vec![0.25, 0.75]));
        let plain = RouterSpec { renormalise: false, ..spec };
        assert_eq!(always(0, None, &plain), (vec![0, 2], vec![0.125, 0.5]));
        let grouped = RouterSpec { groups: Some((3, 1)), ..RouterSpec::softmax(1) };
        assert_eq!(always(0, None, &grouped).0, [0]);
        assert!(matches!(
            route_always(&logits, 1, 3, None, &spec, 3),
            Err(KernelError::Length { expected: 4, found: 3, .. })
        ));
    }

    #[test]
    fn rounding_decides_as_bf16_does() {
        // 1 + 2^-9 and 1 are one number in bf16: the lower index wins there.
        let logits = [0.0, 1.0, 1.0 + 1.0 / 512.0];
        let mut spec = RouterSpec { renormalise: false, ..RouterSpec::softmax(2) };
        let exact = route(&logits, 1, 3, None, &spec).unwrap();
        assert_eq!(exact.ids, [2, 1]);
        spec.precision = Precision::RoundLikeHf { logits: true, weights: false };
        let rounded = route(&logits, 1, 3, None, &spec).unwrap();
        assert_eq!(rounded.ids, [1, 2]);
        assert_eq!(rounded.weights[0], rounded.weights[1]);
        spec.precision = Precision::RoundLikeHf { logits: false, weights: true };
        let weights = route(&logits, 1, 3, None, &spec).unwrap();
        assert_eq!(weights.ids, exact.ids);
        for (rounded, exact) in weights.weights.iter().zip(&exact.weights) {
            assert_eq!(*rounded, half::bf16::from_f32(*exact).to_f32());
            assert_ne!(rounded, exact);
        }
    }

    #[test]
    fn groups_limit_the_choice() {
        // Best two are 3 and 1; only the group {2, 3} is kept.
        let logits = [0.0, 2.0, 1.0, 3.0];
        let spec = RouterSpec { groups: Some((2, 1)), ..RouterSpec::softmax(2) };
        assert_eq!(route(&logits, 1, 4, None, &spec).unwrap().ids, [3, 2]);
        let spec = RouterSpec { groups: Some((2, 1)), ..RouterSpec::softmax(3) };
        assert!(route(&logits, 1, 4, None, &spec).is_err());
    }

    #[test]
    fn bad_logits_are_named() {
        let spec = RouterSpec::softmax(1);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let logits = [0.0, 1.0, 0.0, bad];
            assert_eq!(
                route(&logits, 2, 2, None, &spec),
                Err(KernelError::NotFinite { token: 1, expert: 1 })
            );
        }
        assert!(route(&[0.0], 1, 1, None, &RouterSpec::softmax(2)).is_err());
        assert!(route(&[0.0], 1, 1, None, &RouterSpec::softmax(0)).is_err());
    }

    proptest! {
        #[test]
        fn top_k_equals_a_full_sort(
            logits in proptest::collection::vec((-20i32..20).prop_map(|v| v as f32 / 4.0), 1..40),
            k in 1usize..40,
        ) {
            let k = k.min(logits.len());
            let routing = route(&logits, 1, logits.len(), None, &RouterSpec::softmax(k)).unwrap();
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            // Distinct logits may round to one score, never the other way round.
            let value = |ids: &[u32]| ids.iter().map(|i| logits[*i as usize]).collect::<Vec<_>>();
            prop_assert_eq!(value(&routing.ids), value(&order[..k]));
            prop_assert!((routing.weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
    }
}

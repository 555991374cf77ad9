//! Terms of the loss that look at a router alone.

use moe_merge_kernels::{Routing, Score, activation};

/// Values and gradient of one router's penalties.
#[derive(Debug)]
pub(super) struct Penalty {
    /// `E sum_e f_e P_e`: 1 when the load is even.
    pub load_balance: f64,
    /// Mean of the squared logarithm of the sum of exponentials.
    pub z: f64,
    /// Gradient of `load_balance * weights.0 + z * weights.1` with respect to the logits, `[tokens, experts]`.
    pub gradient: Vec<f32>,
}

/// Load balance and z-loss over the tokens that count.
///
/// * `f_e`: share of (token, slot) pairs that went to `e`, without gradient; `P_e`: mean score, over the sum of a token's
///   scores where they are logistic
/// * `logits`: `[tokens, experts]`; `counted`: `[tokens]`
///
/// # Source
/// Switch Transformer, arXiv 2101.03961, equations 4 to 6 (there with one slot per token); ST-MoE, arXiv 2202.08906,
/// equation 5.
pub(super) fn penalty(
    logits: &[f32],
    routing: &Routing,
    counted: &[bool],
    score: Score,
    weights: (f64, f64),
) -> Penalty {
    let experts = logits.len() / routing.tokens.max(1);
    let mut penalty = Penalty { load_balance: 0.0, z: 0.0, gradient: vec![0.0; logits.len()] };
    let tokens = counted.iter().filter(|c| **c).count() as f64;
    if tokens == 0.0 {
        return penalty;
    }
    let mut load = vec![0.0; experts];
    for (ids, _) in routing.ids.chunks(routing.top_k).zip(counted).filter(|(_, c)| **c) {
        ids.iter().for_each(|e| load[*e as usize] += 1.0 / (tokens * routing.top_k as f64));
    }
    let rows = logits.chunks_exact(experts).zip(penalty.gradient.chunks_exact_mut(experts));
    for ((logits, gradient), _) in rows.zip(counted).filter(|(_, c)| **c) {
        let largest = logits.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        let exps: Vec<f64> = logits.iter().map(|l| f64::from(l - largest).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let lse = f64::from(largest) + sum.ln();
        penalty.z += lse * lse / tokens;
        let scores: Vec<f64> = match score {
            Score::Softmax => exps.iter().map(|e| e / sum).collect(),
            Score::Sigmoid => logits.iter().map(|l| f64::from(activation::sigmoid(*l))).collect(),
        };
        let total: f64 = scores.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let mean: f64 = scores.iter().zip(&load).map(|(s, f)| s / total * f).sum();
        penalty.load_balance += experts as f64 * mean / tokens;
        for e in 0..experts {
            // The slope of a score is s (1 - s); softmax's second part is the mean that is subtracted anyway.
            let own = if score == Score::Sigmoid { 1.0 - scores[e] } else { 1.0 };
            let balance = experts as f64 * scores[e] / total * own * (load[e] - mean);
            let z = 2.0 * lse * exps[e] / sum;
            gradient[e] = ((weights.0 * balance + weights.1 * z) / tokens) as f32;
        }
    }
    penalty
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_merge_kernels::{RouterSpec, route};

    #[test]
    fn even_load_costs_one() {
        let routing = Routing { tokens: 2, top_k: 1, ids: vec![0, 1], weights: vec![0.5; 2] };
        let p = penalty(&[0.0; 4], &routing, &[true; 2], Score::Softmax, (1.0, 1.0));
        assert!((p.load_balance - 1.0).abs() < 1e-12);
        assert!((p.z - 2f64.ln().powi(2)).abs() < 1e-12);
        // All to one expert that gets 3/4 of the weight: 2 * (1 * 3/4).
        let routing = Routing { ids: vec![0, 0], ..routing };
        let l = 3f32.ln();
        let p = penalty(&[l, 0.0, l, 0.0], &routing, &[true; 2], Score::Softmax, (1.0, 0.0));
        assert!((p.load_balance - 1.5).abs() < 1e-7);
    }

    #[test]
    fn gradients_equal_differences() {
        let logits: Vec<f32> = (0..20).map(|i| ((i * 37) % 23) as f32 / 7.0 - 1.5).collect();
        let counted = [false, true, true, true, true];
        for score in [Score::Softmax, Score::Sigmoid] {
            let spec = RouterSpec { score, ..RouterSpec::softmax(2) };
            let routing = route(&logits, 5, 4, None, &spec).unwrap();
            let value = |logits: &[f32]| {
                let p = penalty(logits, &routing, &counted, score, (0.0, 0.0));
                0.3 * p.load_balance + 0.2 * p.z
            };
            let found = penalty(&logits, &routing, &counted, score, (0.3, 0.2)).gradient;
            assert_eq!(found[..4], [0.0; 4]);
            for i in 0..20 {
                let moved = |by: f32| {
                    let mut logits = logits.clone();
                    logits[i] += by;
                    value(&logits)
                };
                let slope = (moved(0.01) - moved(-0.01)) / 0.02;
                assert!((f64::from(found[i]) - slope).abs() < 1e-4, "{i} {} {slope}", found[i]);
            }
        }
    }
}

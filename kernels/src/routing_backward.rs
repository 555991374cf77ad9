//! Gradients through the weights that a router gives.

use crate::activation::sigmoid;
use crate::error::KernelError;
use crate::norm::softmax;
use crate::routing::{RouterSpec, Routing, Score};

/// Gradient of [`crate::route`]: from the weights of the chosen slots to the logits.
///
/// The choice itself has no gradient: it is taken as given. With scores `s`, chosen set `C`, `S = sum_C s`:
/// * weights `s_e`: `ds_e = scale dw_e` on `C`, 0 elsewhere; softmax: `dz = s (ds - s . ds)`; sigmoid: `dz = s (1 - s) ds`
/// * weights `v_e = s_e / S`: `dv_e = scale (dw_e - v . dw)`; softmax: `dz_e = v_e dv_e`, which is 0 outside `C`; sigmoid:
///   `dz_e = v_e (1 - s_e) dv_e`
///
/// With one expert per token and renormalised weights the gradient is 0: the weight is 1 whatever the logits are.
///
/// * `logits`, `d_logits` (overwritten): `[tokens, experts]`; `d_weights`: `[tokens, top_k]`, slots as in `routing`
///
/// # Errors
/// [`KernelError::Length`], or [`KernelError::TopK`] if an id is not below `experts`.
pub fn route_backward(
    logits: &[f32],
    experts: usize,
    routing: &Routing,
    d_weights: &[f32],
    spec: &RouterSpec,
    d_logits: &mut [f32],
) -> Result<(), KernelError> {
    let (tokens, k) = (routing.tokens, routing.top_k);
    KernelError::check("router logits", tokens * experts, logits.len())?;
    KernelError::check("routing ids", tokens * k, routing.ids.len())?;
    KernelError::check("gradient of router weights", tokens * k, d_weights.len())?;
    KernelError::check("gradient of router logits", tokens * experts, d_logits.len())?;
    if let Some(&id) = routing.ids.iter().find(|id| **id as usize >= experts) {
        return Err(KernelError::TopK { top_k: id as usize + 1, experts });
    }
    d_logits.fill(0.0);
    if logits.is_empty() || k == 0 {
        return Ok(());
    }
    let mut scores = vec![0.0; experts];
    for (token, (logits, dz)) in
        logits.chunks_exact(experts).zip(d_logits.chunks_exact_mut(experts)).enumerate()
    {
        scores.copy_from_slice(logits);
        match spec.score {
            Score::Softmax => softmax(&mut scores),
            Score::Sigmoid => scores.iter_mut().for_each(|s| *s = sigmoid(*s)),
        }
        let ids = &routing.ids[token * k..(token + 1) * k];
        one_token(&scores, ids, &d_weights[token * k..(token + 1) * k], spec, dz);
    }
    Ok(())
}

fn one_token(scores: &[f32], ids: &[u32], dw: &[f32], spec: &RouterSpec, dz: &mut [f32]) {
    let chosen = || ids.iter().map(|id| *id as usize).zip(dw);
    // Whether weights are shares of the chosen or of all, the mean of their gradients drops out.
    let (total, mean) = if spec.renormalise {
        let total = chosen().map(|(e, _)| scores[e]).sum::<f32>().max(f32::MIN_POSITIVE);
        (total, chosen().map(|(e, dw)| scores[e] / total * dw).sum())
    } else {
        (1.0, 0.0)
    };
    for (e, dw) in chosen() {
        dz[e] = scores[e] / total * (dw - mean) * spec.scale;
    }
    match (spec.score, spec.renormalise) {
        (Score::Sigmoid, _) => dz.iter_mut().zip(scores).for_each(|(d, s)| *d *= 1.0 - s),
        (Score::Softmax, true) => {}
        (Score::Softmax, false) => {
            let sum: f32 = dz.iter().sum();
            dz.iter_mut().zip(scores).for_each(|(d, s)| *d -= s * sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::route;
    use proptest::prelude::*;

    #[test]
    fn by_hand() {
        // Two of three experts with scores 1/8, 3/8, 4/8.
        let logits = [1f32.ln(), 3f32.ln(), 4f32.ln()];
        let mut spec = RouterSpec { renormalise: false, ..RouterSpec::softmax(2) };
        let routing = route(&logits, 1, 3, None, &spec).unwrap();
        let mut dz = [f32::NAN; 3];
        route_backward(&logits, 3, &routing, &[1.0, 0.0], &spec, &mut dz).unwrap();
        for (found, wanted) in dz.iter().zip([-1.0 / 16.0, -3.0 / 16.0, 1.0 / 4.0]) {
            assert!((found - wanted).abs() < 1e-6, "{dz:?}");
        }
        spec.renormalise = true;
        route_backward(&logits, 3, &routing, &[1.0, 0.0], &spec, &mut dz).unwrap();
        for (found, wanted) in dz.iter().zip([0.0, -12.0 / 49.0, 12.0 / 49.0]) {
            assert!((found - wanted).abs() < 1e-6, "{dz:?}");
        }
    }

    #[test]
    fn one_renormalised_expert_has_no_gradient() {
        for score in [Score::Softmax, Score::Sigmoid] {
            let spec = RouterSpec { score, ..RouterSpec::softmax(1) };
            let logits = [0.3, -1.0, 2.0];
            let routing = route(&logits, 1, 3, None, &spec).unwrap();
            let mut dz = [f32::NAN; 3];
            route_backward(&logits, 3, &routing, &[5.0], &spec, &mut dz).unwrap();
            assert_eq!(dz, [0.0; 3]);
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let spec = RouterSpec::softmax(1);
        let routing = Routing { tokens: 1, top_k: 1, ids: vec![2], weights: vec![1.0] };
        let mut dz = [0.0; 2];
        assert!(route_backward(&[0.0; 2], 2, &routing, &[0.0], &spec, &mut dz).is_err());
        assert!(route_backward(&[0.0; 3], 3, &routing, &[0.0], &spec, &mut dz).is_err());
    }

    proptest! {
        /// Central differences of `sum(dw . weights)` in f64, for logits far enough apart that no choice flips.
        #[test]
        fn equals_differences(
            order in Just((0..6usize).collect::<Vec<_>>()).prop_shuffle(),
            dw in proptest::collection::vec(-1f32..1.0, 6),
            k in 1usize..=6, sigmoids in any::<bool>(), renormalise in any::<bool>(),
            groups in any::<bool>(), biased in any::<bool>(),
        ) {
            let logits: Vec<f32> = order.iter().map(|o| *o as f32 * 0.7 - 2.0).collect();
            let score = if sigmoids { Score::Sigmoid } else { Score::Softmax };
            let groups = (groups && k <= 4).then_some((3, 2));
            let spec = RouterSpec { score, renormalise, scale: 1.7, groups, ..RouterSpec::softmax(k) };
            let bias = [0.3, 0.0, -0.2, 0.0, 0.5, 0.0];
            let bias = biased.then_some(&bias[..]);
            let routing = route(&logits, 1, 6, bias, &spec).unwrap();
            let mut dz = vec![f32::NAN; 6];
            route_backward(&logits, 6, &routing, &dw[..k], &spec, &mut dz).unwrap();
            let value = |z: &[f64]| -> f64 {
                let raw: Vec<f64> = match score {
                    Score::Softmax => z.iter().map(|z| z.exp()).collect(),
                    Score::Sigmoid => z.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
                };
                let all: f64 = if sigmoids { 1.0 } else { raw.iter().sum() };
                let chosen: f64 = routing.ids.iter().map(|e| raw[*e as usize] / all).sum();
                let total = if renormalise { chosen } else { 1.0 };
                let slots = routing.ids.iter().zip(&dw);
                slots.map(|(e, dw)| raw[*e as usize] / all / total * 1.7 * f64::from(*dw)).sum()
            };
            for e in 0..6 {
                let mut z: Vec<f64> = logits.iter().map(|z| f64::from(*z)).collect();
                z[e] += 1e-5;
                let above = value(&z);
                z[e] -= 2e-5;
                let slope = (above - value(&z)) / 2e-5;
                prop_assert!((f64::from(dz[e]) - slope).abs() < 1e-5, "{} {} {}", e, dz[e], slope);
            }
        }
    }
}

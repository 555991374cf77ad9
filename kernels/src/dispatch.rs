//! Sparse dispatch: each expert gets its tokens, results are added in slot order.

use crate::activation::Activation;
use crate::error::KernelError;
use crate::linear::linear;
use crate::routing::Routing;
use crate::view::MatView;

/// One expert: a gated MLP.
#[derive(Debug, Clone, Copy)]
pub struct ExpertView<'a> {
    /// `[inter, hidden]`.
    pub gate: MatView<'a>,
    /// `[inter, hidden]`.
    pub up: MatView<'a>,
    /// `[hidden, inter]`.
    pub down: MatView<'a>,
}

/// (token, slot) pairs sorted by expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    /// `[experts + 1]`: the pairs of expert `e` are `order[offsets[e]..offsets[e + 1]]`.
    pub offsets: Vec<u32>,
    /// Pair indices `token * top_k + slot`, in that order inside each expert.
    pub order: Vec<u32>,
    /// Where each pair stands in `order`.
    pub inverse: Vec<u32>,
}

/// Sorts pairs by expert with a stable counting sort.
///
/// # Errors
/// [`KernelError::TopK`] if an id is not below `experts`.
pub fn group(routing: &Routing, experts: usize) -> Result<Groups, KernelError> {
    let pairs = routing.ids.len();
    let mut offsets = vec![0u32; experts + 1];
    for &id in &routing.ids {
        let slot = offsets
            .get_mut(id as usize + 1)
            .ok_or(KernelError::TopK { top_k: id as usize + 1, experts })?;
        *slot += 1;
    }
    for e in 0..experts {
        offsets[e + 1] += offsets[e];
    }
    let mut next = offsets.clone();
    let (mut order, mut inverse) = (vec![0; pairs], vec![0; pairs]);
    for (pair, &id) in routing.ids.iter().enumerate() {
        let at = &mut next[id as usize];
        order[*at as usize] = pair as u32;
        inverse[pair] = *at;
        *at += 1;
    }
    Ok(Groups { offsets, order, inverse })
}

/// The routed experts of one layer.
///
/// `out[t] = sum_slot weight[t, slot] * down_e(f(gate_e(x[t])) * up_e(x[t]))`, `e = ids[t, slot]`, added in slot order.
///
/// * `x`, `out`: `[tokens, hidden]`
///
/// # Errors
/// [`KernelError::Length`] or [`KernelError::TopK`] if routing, experts and slices do not fit each other.
pub fn moe_forward(
    x: &[f32],
    routing: &Routing,
    experts: &[ExpertView<'_>],
    activation: Activation,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let (tokens, k) = (routing.tokens, routing.top_k);
    KernelError::check("routing ids", tokens * k, routing.ids.len())?;
    KernelError::check("routing weights", tokens * k, routing.weights.len())?;
    let hidden = experts.first().map_or(0, |e| e.gate.cols());
    KernelError::check("expert input", tokens * hidden, x.len())?;
    KernelError::check("expert output", tokens * hidden, out.len())?;
    let groups = group(routing, experts.len())?;
    let mut y = vec![0.0; tokens * k * hidden]; // [pairs by expert, hidden]
    let (mut input, mut gate, mut up) = (Vec::new(), Vec::new(), Vec::new());
    for (e, expert) in experts.iter().enumerate() {
        let (from, to) = (groups.offsets[e] as usize, groups.offsets[e + 1] as usize);
        if from == to {
            continue;
        }
        let inter = expert.gate.rows();
        input.clear();
        for &pair in &groups.order[from..to] {
            let token = pair as usize / k;
            input.extend_from_slice(&x[token * hidden..(token + 1) * hidden]);
        }
        gate.resize((to - from) * inter, 0.0);
        up.resize((to - from) * inter, 0.0);
        linear(&input, expert.gate, None, &mut gate)?;
        linear(&input, expert.up, None, &mut up)?;
        activation.gate(&mut gate, &up);
        linear(&gate, expert.down, None, &mut y[from * hidden..to * hidden])?;
    }
    if hidden == 0 {
        return Ok(());
    }
    for (token, out) in out.chunks_exact_mut(hidden).enumerate() {
        out.fill(0.0);
        for slot in 0..k {
            let pair = token * k + slot;
            let weight = routing.weights[pair];
            let at = groups.inverse[pair] as usize * hidden;
            out.iter_mut().zip(&y[at..at + hidden]).for_each(|(o, v)| *o += weight * v);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::{RouterSpec, route};
    use crate::{Dtype, cast};
    use proptest::prelude::*;

    #[test]
    fn groups_by_hand() {
        let routing =
            Routing { tokens: 3, top_k: 2, ids: vec![2, 0, 0, 2, 2, 1], weights: vec![0.5; 6] };
        let groups = group(&routing, 4).unwrap();
        assert_eq!(groups.offsets, [0, 2, 3, 6, 6]);
        assert_eq!(groups.order, [1, 2, 5, 0, 3, 4]);
        assert_eq!(groups.inverse, [3, 0, 1, 4, 5, 2]);
        assert!(group(&routing, 2).is_err());
    }

    /// Bytes of the three matrices of `experts` experts.
    fn weights(experts: usize, hidden: usize, inter: usize, seed: usize) -> Vec<[Vec<u8>; 3]> {
        (0..experts)
            .map(|e| {
                [0, 1, 2].map(|m| {
                    let values: Vec<f32> = (0..hidden * inter)
                        .map(|i| ((i * 31 + e * 17 + m * 7 + seed) % 97) as f32 / 97.0 - 0.5)
                        .collect();
                    let mut bytes = vec![0; values.len() * 2];
                    cast::narrow(&values, Dtype::BF16, &mut bytes);
                    bytes
                })
            })
            .collect()
    }

    fn views(weights: &[[Vec<u8>; 3]], hidden: usize, inter: usize) -> Vec<ExpertView<'_>> {
        let view = |b, rows, cols| MatView::new(b, Dtype::BF16, rows, cols).unwrap();
        weights
            .iter()
            .map(|[gate, up, down]| ExpertView {
                gate: view(gate, inter, hidden),
                up: view(up, inter, hidden),
                down: view(down, hidden, inter),
            })
            .collect()
    }

    /// Every expert on every token, weighed with what the router gave it.
    fn dense_loop(
        x: &[f32],
        routing: &Routing,
        experts: &[ExpertView<'_>],
        hidden: usize,
    ) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        for (e, expert) in experts.iter().enumerate() {
            for token in 0..routing.tokens {
                let x = &x[token * hidden..(token + 1) * hidden];
                let inter = expert.gate.rows();
                let (mut g, mut u, mut y) = (vec![0.0; inter], vec![0.0; inter], vec![0.0; hidden]);
                linear(x, expert.gate, None, &mut g).unwrap();
                linear(x, expert.up, None, &mut u).unwrap();
                Activation::Silu.gate(&mut g, &u);
                linear(&g, expert.down, None, &mut y).unwrap();
                for slot in 0..routing.top_k {
                    let pair = token * routing.top_k + slot;
                    if routing.ids[pair] as usize == e {
                        for (i, v) in y.iter().enumerate() {
                            out[token * hidden + i] += routing.weights[pair] * v;
                        }
                    }
                }
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn dispatch_equals_the_dense_loop(
            tokens in 0usize..30, experts in 1usize..7, k in 1usize..7,
            hidden in 1usize..20, inter in 1usize..20, seed in 0usize..1000,
        ) {
            let k = k.min(experts);
            let bytes = weights(experts, hidden, inter, seed);
            let experts_ = views(&bytes, hidden, inter);
            let x: Vec<f32> = (0..tokens * hidden).map(|i| ((i + seed) as f32 * 0.37).sin()).collect();
            let logits: Vec<f32> =
                (0..tokens * experts).map(|i| ((i + seed) as f32 * 1.3).cos()).collect();
            let routing = route(&logits, tokens, experts, None, &RouterSpec::softmax(k)).unwrap();
            let mut out = vec![f32::NAN; x.len()];
            moe_forward(&x, &routing, &experts_, Activation::Silu, &mut out).unwrap();
            for (o, e) in out.iter().zip(dense_loop(&x, &routing, &experts_, hidden)) {
                prop_assert!((o - e).abs() < 1e-4, "{} {}", o, e);
            }

            // The same experts under other numbers: not a bit may change.
            let renamed: Vec<u32> =
                routing.ids.iter().map(|id| experts as u32 - 1 - id).collect();
            let reversed: Vec<_> = experts_.iter().rev().copied().collect();
            let mut again = vec![0.0; x.len()];
            let renamed = Routing { ids: renamed, ..routing };
            moe_forward(&x, &renamed, &reversed, Activation::Silu, &mut again).unwrap();
            prop_assert_eq!(out, again);
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (hidden, inter, tokens) = (96, 200, 60);
        let bytes = weights(4, hidden, inter, 5);
        let experts = views(&bytes, hidden, inter);
        let x: Vec<f32> = (0..tokens * hidden).map(|i| (i as f32 * 0.37).sin()).collect();
        let logits: Vec<f32> = (0..tokens * 4).map(|i| (i as f32 * 1.3).cos()).collect();
        let routing = route(&logits, tokens, 4, None, &RouterSpec::softmax(2)).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; x.len()];
            pool.install(|| moe_forward(&x, &routing, &experts, Activation::Silu, &mut out))
                .unwrap();
            out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(2));
    }
}

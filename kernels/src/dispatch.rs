//! Sparse dispatch: each expert gets its tokens, results are added in slot order.

use std::ops::Range;

use crate::activation::Activation;
use crate::error::KernelError;
use crate::exec::Exec;
use crate::linear::ALONE_BELOW;
use crate::panel::{Form, GateUpBlock, LinearBlock, Output, Panels, ROWS};
use crate::routing::Routing;
use crate::rows;
use crate::scratch::Scratch;
use crate::tasks;
use crate::vector::{self, Job, Vector};
use crate::view::MatView;

/// Tokens of one task that adds up slots.
const TOKENS: usize = 32;

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

impl ExpertView<'_> {
    /// Whether the three fit each other and a stream of width `hidden`.
    pub(crate) fn check(&self, hidden: usize) -> Result<(), KernelError> {
        let inter = self.gate.rows();
        for (what, expected, found) in [
            ("columns of an expert's gate", hidden, self.gate.cols()),
            ("columns of an expert's up", hidden, self.up.cols()),
            ("rows of an expert's up", inter, self.up.rows()),
            ("columns of an expert's down", inter, self.down.cols()),
            ("rows of an expert's down", hidden, self.down.rows()),
        ] {
            KernelError::check(what, expected, found)?;
        }
        Ok(())
    }
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
/// * the same bits for any number of threads, and whatever numbers the experts have
///
/// # Errors
/// [`KernelError::Length`] or [`KernelError::TopK`] if routing, experts and slices do not fit each other.
pub fn moe_forward(
    x: &[f32],
    routing: &Routing,
    experts: &[ExpertView<'_>],
    activation: Activation,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    let (tokens, k) = (routing.tokens, routing.top_k);
    KernelError::check("routing ids", tokens * k, routing.ids.len())?;
    KernelError::check("routing weights", tokens * k, routing.weights.len())?;
    let hidden = experts.first().map_or(0, |e| e.gate.cols());
    KernelError::check("expert input", tokens * hidden, x.len())?;
    KernelError::check("expert output", tokens * hidden, out.len())?;
    for expert in experts {
        expert.check(hidden)?;
    }
    if tokens > 0 && rows::takes(tokens, exec) {
        return rows::moe_few(x, routing, experts, activation, out, exec);
    }
    let groups = group(routing, experts.len())?;
    if out.is_empty() {
        return Ok(());
    }
    let mut y = Scratch::new(tokens * k * hidden); // [pairs by expert, hidden]
    let mut parts: Vec<Part<'_>> = (0..experts.len())
        .filter_map(|e| Part::new(&experts[e], groups.offsets[e]..groups.offsets[e + 1], exec))
        .collect();
    // Large ones first: what is left at the end is small.
    parts.sort_by_key(|part| std::cmp::Reverse(part.pairs.len()));
    products(x, k, &groups, &parts, activation, &mut y, exec);
    combine(&y, &groups, routing, out, exec);
    Ok(())
}

/// The pairs of one expert, on their way through it.
struct Part<'a> {
    expert: ExpertView<'a>,
    /// Which of the pairs by expert.
    pairs: Range<usize>,
    input: Panels,
    inner: Panels,
}

impl<'a> Part<'a> {
    /// None where no token visits the expert.
    fn new(expert: &ExpertView<'a>, pairs: Range<u32>, exec: &Exec) -> Option<Self> {
        let pairs = pairs.start as usize..pairs.end as usize;
        if pairs.is_empty() {
            return None;
        }
        let matrices = [expert.gate, expert.up, expert.down];
        let dots = matrices.iter().all(|m| Form::of(m.dtype(), exec) == Form::Pairs);
        let form = if dots { Form::Pairs } else { Form::Wide };
        let panels = |cols| Panels::new(pairs.len(), cols, form, exec.isa);
        let (input, inner) = (panels(expert.gate.cols()), panels(expert.gate.rows()));
        Some(Self { expert: *expert, pairs, input, inner })
    }
}

/// Tokens into panels, gate and up into panels, down into `y [pairs by expert, hidden]`: for all experts together.
fn products(
    x: &[f32],
    k: usize,
    groups: &Groups,
    parts: &[Part<'_>],
    activation: Activation,
    y: &mut [f32],
    exec: &Exec,
) {
    let work: usize =
        parts.iter().map(|p| p.pairs.len() * p.expert.gate.rows() * p.expert.gate.cols()).sum();
    let shared = work >= ALONE_BELOW;
    let fills: Vec<_> =
        parts.iter().flat_map(|p| (0..p.input.list.len()).map(move |i| (p, i))).collect();
    tasks::for_each(fills.len(), shared, |task| {
        let (part, index) = fills[task];
        let token = |pair: usize| groups.order[part.pairs.start + pair] as usize / k;
        // SAFETY: every task has a panel of its own; the order names tokens of `x`.
        unsafe { part.input.fill(index, x, token, exec.isa) }
    });
    let blocks = |rows: fn(&ExpertView<'_>) -> usize, step: usize| -> Vec<_> {
        let all = parts.iter().flat_map(|part| {
            let rows = rows(&part.expert);
            part.input.chunks().into_iter().flat_map(move |chunk| {
                let blocks = (0..rows).step_by(step);
                blocks.map(move |from| (part, chunk.clone(), from..rows.min(from + step)))
            })
        });
        all.collect()
    };
    // As many gate rows as up rows.
    let gates = blocks(|e| e.gate.rows(), ROWS / 2);
    tasks::for_each(gates.len(), shared, |task| {
        let (part, chunk, rows) = gates[task].clone();
        let (ExpertView { gate, up, .. }, panels, out) = (part.expert, &part.input, &part.inner);
        // SAFETY: every task has rows and panels of its own, and they begin at an even row.
        unsafe { GateUpBlock { gate, up, activation, rows, panels, chunk, out }.compute(exec.isa) }
    });
    let stride = parts.first().map_or(0, |p| p.expert.down.rows());
    let start = Output { start: y.as_mut_ptr(), stride };
    let downs = blocks(|e| e.down.rows(), ROWS);
    tasks::for_each(downs.len(), shared, |task| {
        let (part, chunk, rows) = downs[task].clone();
        let (w, panels) = (part.expert.down, &part.inner);
        let out = start.row(part.pairs.start);
        // SAFETY: every task has rows and tokens of its own, and `y` holds all pairs.
        unsafe { LinearBlock { w, bias: None, rows, panels, chunk, out }.compute(exec.isa) }
    });
}

/// `out[t] = sum_slot weight[t, slot] * y[pair]`, in slot order.
fn combine(y: &[f32], groups: &Groups, routing: &Routing, out: &mut [f32], exec: &Exec) {
    let (hidden, k) = (out.len() / routing.tokens, routing.top_k);
    let start = Output { start: out.as_mut_ptr(), stride: hidden };
    tasks::for_each(routing.tokens.div_ceil(TOKENS), out.len() * k >= ALONE_BELOW, |task| {
        let from = task * TOKENS;
        let tokens = from..routing.tokens.min(from + TOKENS);
        // SAFETY: every task has tokens of its own.
        let rows =
            unsafe { std::slice::from_raw_parts_mut(start.row(from).start, tokens.len() * hidden) };
        for (token, out) in tokens.zip(rows.chunks_exact_mut(hidden)) {
            let pairs = token * k..(token + 1) * k;
            let (weights, places) = (&routing.weights[pairs.clone()], &groups.inverse[pairs]);
            vector::run(exec.isa, Combine { y, weights, places, out });
        }
    });
}

struct Combine<'a> {
    y: &'a [f32],
    weights: &'a [f32],
    places: &'a [u32],
    out: &'a mut [f32],
}

impl Job for Combine<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let hidden = self.out.len();
        let slots = || self.weights.iter().zip(self.places);
        let whole = hidden / S::N * S::N;
        for at in (0..whole).step_by(S::N) {
            // SAFETY: `at + N` numbers are in the output and in each row of `y`.
            unsafe {
                let mut sum = S::zero();
                for (weight, place) in slots() {
                    let row = self.y.as_ptr().add(*place as usize * hidden + at);
                    sum = S::fma(S::splat(*weight), S::load(row), sum);
                }
                S::store(self.out.as_mut_ptr().add(at), sum);
            }
        }
        for (at, out) in self.out.iter_mut().enumerate().skip(whole) {
            *out =
                slots().map(|(weight, place)| weight * self.y[*place as usize * hidden + at]).sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::{RouterSpec, route};
    use crate::{Accuracy, Batching, Dtype, Isa, cast, linear};
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
        let (mut out, exec) = (vec![0.0; x.len()], Exec::default());
        for (e, expert) in experts.iter().enumerate() {
            for token in 0..routing.tokens {
                let x = &x[token * hidden..(token + 1) * hidden];
                let inter = expert.gate.rows();
                let (mut g, mut u, mut y) = (vec![0.0; inter], vec![0.0; inter], vec![0.0; hidden]);
                linear(x, expert.gate, None, &mut g, &exec).unwrap();
                linear(x, expert.up, None, &mut u, &exec).unwrap();
                Activation::Silu.gate(&mut g, &u);
                linear(&g, expert.down, None, &mut y, &exec).unwrap();
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
            moe_forward(&x, &routing, &experts_, Activation::Silu, &mut out, &Exec::default()).unwrap();
            for (o, e) in out.iter().zip(dense_loop(&x, &routing, &experts_, hidden)) {
                prop_assert!((o - e).abs() < 1e-4, "{} {}", o, e);
            }

            // The same experts under other numbers: not a bit may change.
            let renamed: Vec<u32> =
                routing.ids.iter().map(|id| experts as u32 - 1 - id).collect();
            let reversed: Vec<_> = experts_.iter().rev().copied().collect();
            let mut again = vec![0.0; x.len()];
            let renamed = Routing { ids: renamed, ..routing };
            moe_forward(&x, &renamed, &reversed, Activation::Silu, &mut again, &Exec::default()).unwrap();
            prop_assert_eq!(out, again);
        }
    }

    #[test]
    fn every_set_equals_the_dense_loop() {
        for (tokens, hidden, inter) in [(40, 33, 27), (70, 64, 48), (150, 20, 101)] {
            let bytes = weights(5, hidden, inter, 9);
            let experts = views(&bytes, hidden, inter);
            let x: Vec<f32> = (0..tokens * hidden).map(|i| (i as f32 * 0.37).sin()).collect();
            let logits: Vec<f32> = (0..tokens * 5).map(|i| (i as f32 * 1.3).cos()).collect();
            let routing = route(&logits, tokens, 5, None, &RouterSpec::softmax(2)).unwrap();
            let wanted = dense_loop(&x, &routing, &experts, hidden);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                for (accuracy, near) in [(Accuracy::Exact, 1e-4), (Accuracy::Fast, 2e-2)] {
                    let exec = Exec { isa, accuracy, batching: Batching::Fastest };
                    let mut out = vec![f32::NAN; x.len()];
                    moe_forward(&x, &routing, &experts, Activation::Silu, &mut out, &exec).unwrap();
                    for (o, e) in out.iter().zip(&wanted) {
                        assert!((o - e).abs() < near * e.abs().max(1.0), "{exec:?} {o} {e}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_activation_is_applied() {
        let (tokens, hidden, inter) = (20, 24, 30);
        let bytes = weights(1, hidden, inter, 3);
        let experts = views(&bytes, hidden, inter);
        let x: Vec<f32> = (0..tokens * hidden).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let routing =
            Routing { tokens, top_k: 1, ids: vec![0; tokens], weights: vec![1.0; tokens] };
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                let exec = Exec::on(isa).unwrap();
                let (mut g, mut u) = (vec![0.0; tokens * inter], vec![0.0; tokens * inter]);
                linear(&x, experts[0].gate, None, &mut g, &exec).unwrap();
                linear(&x, experts[0].up, None, &mut u, &exec).unwrap();
                activation.gate(&mut g, &u);
                let (mut wanted, mut out) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                linear(&g, experts[0].down, None, &mut wanted, &exec).unwrap();
                moe_forward(&x, &routing, &experts, activation, &mut out, &exec).unwrap();
                for (o, e) in out.iter().zip(&wanted) {
                    assert!((o - e).abs() < 1e-4, "{activation:?} {isa:?} {o} {e}");
                }
            }
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
            pool.install(|| {
                moe_forward(&x, &routing, &experts, Activation::Silu, &mut out, &Exec::default())
            })
            .unwrap();
            out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(2));
    }
}

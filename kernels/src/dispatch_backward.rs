//! Gradients through sparse dispatch.

use std::ops::Range;

use crate::activation::Activation;
use crate::dispatch::{ExpertView, Groups, group};
use crate::error::KernelError;
use crate::exec::Exec;
use crate::expert::{Backward, Expert, Factors, TOKENS, Tokens};
use crate::lora::ExpertLora;
use crate::routing::Routing;
use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};

/// Parts of the tokens of an expert with LoRA pairs: each has sums of its own for the factors. Fixed, so that the split (and
/// with it every bit of the result) does not depend on the number of threads.
const CHUNKS: usize = 8;

/// Multiply-adds below which handing work to other threads costs more than it gains.
const ALONE_BELOW: usize = 1 << 18;

/// Gradients of [`crate::moe_forward`] with respect to its input and to the weights of the chosen slots.
///
/// For a pair of token `t` and expert `e` with weight `w`: `a = down_eᵀ d_out[t]`; `dw = a . f(g) u`,
/// `dx[t] += gate_eᵀ (w a u f'(g)) + up_eᵀ (w a f(g))`, pairs in slot order. Nothing is kept between forward and backward:
/// `g` and `u` are computed again, block by block.
///
/// * `x`, `d_out`, `d_x` (overwritten; left out where it is not wanted): `[tokens, hidden]`
/// * returns the gradient of the weights, `[tokens, top_k]`
/// * f32 sums; many tokens of bf16 experts are rounded to bf16 where `exec` is fast; the same bits for any number of threads
/// * working memory: `d_x` of every pair, and blocks for each thread
///
/// # Errors
/// [`KernelError::Length`] or [`KernelError::TopK`] if routing, experts and slices do not fit each other.
pub fn moe_backward(
    x: &[f32],
    routing: &Routing,
    experts: &[ExpertView<'_>],
    activation: Activation,
    d_out: &[f32],
    d_x: Option<&mut [f32]>,
    exec: &Exec,
) -> Result<Vec<f32>, KernelError> {
    let block = Block { x, routing, experts, activation, lora: None, exec };
    if block.turned() {
        return Ok(block.backward_turned(d_out, d_x)?.0);
    }
    Ok(block.backward(d_out, d_x)?.0)
}

/// The routed experts of a layer, one of which may have LoRA pairs.
pub(crate) struct Block<'a> {
    pub x: &'a [f32],
    pub routing: &'a Routing,
    pub experts: &'a [ExpertView<'a>],
    pub activation: Activation,
    pub lora: Option<&'a ExpertLora<'a>>,
    pub exec: &'a Exec,
}

/// Some pairs of one expert.
struct Task {
    expert: usize,
    /// Which of the pairs by expert.
    pairs: Range<usize>,
    /// Which sum of gradients of factors, if the expert has LoRA pairs.
    chunk: Option<usize>,
}

impl Block<'_> {
    /// Checks all sizes, and sorts pairs by expert.
    pub fn groups(&self) -> Result<Groups, KernelError> {
        let Block { x, routing, experts, lora, .. } = self;
        let (tokens, k) = (routing.tokens, routing.top_k);
        KernelError::check("routing ids", tokens * k, routing.ids.len())?;
        KernelError::check("routing weights", tokens * k, routing.weights.len())?;
        let hidden = self.hidden();
        KernelError::check("expert input", tokens * hidden, x.len())?;
        for expert in *experts {
            expert.check(hidden)?;
        }
        if let Some(lora) = lora {
            lora.check(experts)?;
        }
        group(routing, experts.len())
    }

    pub fn hidden(&self) -> usize {
        self.experts.first().map_or(0, |e| e.gate.cols())
    }

    /// Expert `e` with the pairs it has.
    pub fn expert(&self, e: usize) -> Expert<'_> {
        let lora = self.lora.filter(|lora| lora.expert == e);
        Expert { view: self.experts[e], lora, activation: self.activation, isa: self.exec.isa }
    }

    /// Whether `pairs` of some experts are worth another thread.
    pub fn shared(&self, pairs: usize) -> bool {
        let inter = self.experts.first().map_or(0, |e| e.gate.rows());
        pairs * self.hidden() * inter >= ALONE_BELOW
    }

    /// Gradients of the weights, and of the factors as [`Factors`] lays them out (none without pairs).
    pub fn backward(
        &self,
        d_out: &[f32],
        d_x: Option<&mut [f32]>,
    ) -> Result<(Vec<f32>, Scratch), KernelError> {
        let groups = self.groups()?;
        let (hidden, k) = (self.hidden(), self.routing.top_k);
        KernelError::check("gradient of expert output", self.x.len(), d_out.len())?;
        if let Some(d_x) = &d_x {
            KernelError::check("gradient of expert input", self.x.len(), d_x.len())?;
        }
        let pairs = groups.order.len();
        let mut d_weights = Scratch::new(pairs); // [pairs by expert]
        let mut d_pairs = Scratch::new(if d_x.is_some() { pairs * hidden } else { 0 }); // [pairs by expert, hidden]
        let size = self.lora.map_or(0, |lora| Factors::of(lora).len());
        let tasks = self.tasks(&groups);
        let chunks = tasks.iter().filter(|task| task.chunk.is_some()).count().max(1);
        let mut d_factors = Scratch::zeroed(chunks * size); // [chunks, factors]
        let weights_out = Parts::new(&mut d_weights);
        let rows_out = d_x.is_some().then(|| Parts::new(&mut d_pairs));
        let factors_out = Parts::new(&mut d_factors);
        for_each(tasks.len(), self.shared(pairs), |index| {
            let Task { expert, pairs, chunk } = &tasks[index];
            let expert = self.expert(*expert);
            for from in pairs.clone().step_by(TOKENS) {
                let count = TOKENS.min(pairs.end - from);
                let order = &groups.order[from..from + count];
                let tokens = || order.iter().map(|pair| *pair as usize / k);
                let mut weights = [0.0; TOKENS];
                for (weight, pair) in weights.iter_mut().zip(order) {
                    *weight = self.routing.weights[*pair as usize];
                }
                let input = Tokens::gather(self.exec.isa, self.x, hidden, tokens());
                let back = Tokens::gather(self.exec.isa, d_out, hidden, tokens());
                // SAFETY: every pair belongs to one task, and every chunk of sums to one task.
                let to = unsafe {
                    Backward {
                        weights: &weights[..count],
                        d_weights: weights_out.range(from, count),
                        d_x: rows_out.as_ref().map(|out| out.range(from * hidden, count * hidden)),
                        d_factors: match chunk {
                            Some(chunk) => factors_out.range(chunk * size, size),
                            None => &mut [],
                        },
                    }
                };
                expert.backward(&input, &back, to);
            }
        });
        if let Some(d_x) = d_x {
            self.combine(&groups, &d_pairs, d_x);
        }
        let by_pair = groups.inverse.iter().map(|at| d_weights[*at as usize]).collect();
        if size > 0 {
            let (sum, rest) = d_factors.split_at_mut(size);
            for more in rest.chunks_exact(size) {
                sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            }
        }
        Ok((by_pair, d_factors))
    }

    /// Parts of the work, the expert with LoRA pairs first, then the largest.
    fn tasks(&self, groups: &Groups) -> Vec<Task> {
        let mut tasks = Vec::new();
        for e in 0..self.experts.len() {
            let (from, to) = (groups.offsets[e] as usize, groups.offsets[e + 1] as usize);
            let blocks = (to - from).div_ceil(TOKENS);
            let with_lora = self.lora.is_some_and(|lora| lora.expert == e);
            let parts = if with_lora { blocks.min(CHUNKS) } else { blocks };
            for part in 0..parts {
                let start = |part: usize| to.min(from + part * blocks / parts * TOKENS);
                let pairs = start(part)..start(part + 1);
                tasks.push(Task { expert: e, pairs, chunk: with_lora.then_some(part) });
            }
        }
        tasks.sort_by_key(|task| (task.chunk.is_none(), std::cmp::Reverse(task.pairs.len())));
        tasks
    }

    /// `out[t]` is the sum of the rows of its pairs, in slot order.
    pub fn combine(&self, groups: &Groups, rows: &[f32], out: &mut [f32]) {
        let (hidden, k) = (self.hidden(), self.routing.top_k);
        if hidden == 0 || k == 0 {
            return out.fill(0.0);
        }
        for (out, inverse) in out.chunks_exact_mut(hidden).zip(groups.inverse.chunks_exact(k)) {
            out.fill(0.0);
            for at in inverse {
                let row = &rows[*at as usize * hidden..][..hidden];
                out.iter_mut().zip(row).for_each(|(o, v)| *o += v);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, Isa, MatView, RouterSpec, cast, route};

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 127) as f32 / 64.0 - 1.0).collect()
    }

    /// Numbers and bf16 bytes of gate, up and down of each expert; the numbers are exact in bf16.
    fn experts(count: usize, hidden: usize, inter: usize) -> Vec<[(Vec<f32>, Vec<u8>); 3]> {
        (0..count)
            .map(|e| {
                [0, 1, 2].map(|m| {
                    let values = numbers(hidden * inter, 3 * e + m + 1);
                    let mut bytes = vec![0; values.len() * 2];
                    cast::narrow(&values, Dtype::BF16, &mut bytes);
                    (values, bytes)
                })
            })
            .collect()
    }

    fn views(
        experts: &[[(Vec<f32>, Vec<u8>); 3]],
        hidden: usize,
        inter: usize,
    ) -> Vec<ExpertView<'_>> {
        let view = |b, rows, cols| MatView::new(b, Dtype::BF16, rows, cols).unwrap();
        experts
            .iter()
            .map(|[gate, up, down]| ExpertView {
                gate: view(&gate.1, inter, hidden),
                up: view(&up.1, inter, hidden),
                down: view(&down.1, hidden, inter),
            })
            .collect()
    }

    /// `sum(d_out . moe(x, weights))` by the formula, in f64.
    fn value(
        x: &[f64],
        weights: &[f64],
        routing: &Routing,
        experts: &[[(Vec<f32>, Vec<u8>); 3]],
        d_out: &[f32],
        hidden: usize,
    ) -> f64 {
        let mut sum = 0.0;
        for (pair, weight) in weights.iter().enumerate() {
            let token = pair / routing.top_k;
            let [gate, up, down] = &experts[routing.ids[pair] as usize];
            let inter = gate.0.len() / hidden;
            let x = &x[token * hidden..(token + 1) * hidden];
            let row = |m: &[f32], r: usize| -> f64 {
                m[r * hidden..(r + 1) * hidden].iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()
            };
            for i in 0..inter {
                let g = row(&gate.0, i);
                let h = g / (1.0 + (-g).exp()) * row(&up.0, i);
                for d in 0..hidden {
                    let back = f64::from(d_out[token * hidden + d]);
                    sum += weight * back * f64::from(down.0[d * inter + i]) * h;
                }
            }
        }
        sum
    }

    #[test]
    fn equals_differences() {
        let (tokens, hidden, inter) = (5, 4, 3);
        let sets = Isa::ALL.into_iter().filter(|isa| isa.available());
        let cases = [(3, 1), (3, 2), (3, 3), (1, 1)];
        for (isa, (count, k)) in sets.flat_map(|isa| cases.map(|case| (isa, case))) {
            let exec = Exec::on(isa).unwrap();
            let stored = experts(count, hidden, inter);
            let (x, d_out) = (numbers(tokens * hidden, 50), numbers(tokens * hidden, 60));
            let logits = numbers(tokens * count, 70);
            let spec = RouterSpec { renormalise: false, ..RouterSpec::softmax(k) };
            let routing = route(&logits, tokens, count, None, &spec).unwrap();
            let views = views(&stored, hidden, inter);
            let mut d_x = vec![f32::NAN; x.len()];
            let silu = Activation::Silu;
            let found =
                moe_backward(&x, &routing, &views, silu, &d_out, Some(&mut d_x), &exec).unwrap();
            let alone = moe_backward(&x, &routing, &views, silu, &d_out, None, &exec).unwrap();
            assert_eq!(found, alone);
            let wide = |x: &[f32]| x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let slope = |which: usize, i: usize| {
                let moved = |by: f64| {
                    let (mut x, mut w) = (wide(&x), wide(&routing.weights));
                    if which == 0 {
                        x[i] += by
                    } else {
                        w[i] += by
                    }
                    value(&x, &w, &routing, &stored, &d_out, hidden)
                };
                (moved(1e-5) - moved(-1e-5)) / 2e-5
            };
            for (which, found) in [&d_x, &found].into_iter().enumerate() {
                for (i, found) in found.iter().enumerate() {
                    let wanted = slope(which, i);
                    let near = 1e-4 * wanted.abs().max(1.0);
                    assert!(
                        (f64::from(*found) - wanted).abs() < near,
                        "{which} {i} {found} {wanted}"
                    );
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (tokens, hidden, inter) = (90, 40, 200);
        let stored = experts(4, hidden, inter);
        let views = views(&stored, hidden, inter);
        let (x, d_out) = (numbers(tokens * hidden, 50), numbers(tokens * hidden, 60));
        let routing =
            route(&numbers(tokens * 4, 70), tokens, 4, None, &RouterSpec::softmax(2)).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut d_x = vec![0.0; x.len()];
            let gelu = Activation::Gelu;
            let dw = pool
                .install(|| {
                    moe_backward(
                        &x,
                        &routing,
                        &views,
                        gelu,
                        &d_out,
                        Some(&mut d_x),
                        &Exec::default(),
                    )
                })
                .unwrap();
            d_x.iter().chain(&dw).map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let stored = experts(1, 2, 2);
        let views = views(&stored, 2, 2);
        let routing = Routing { tokens: 1, top_k: 1, ids: vec![0], weights: vec![1.0] };
        let run = |x: &[f32], d_out: &[f32], d_x: &mut [f32]| {
            moe_backward(x, &routing, &views, Activation::Silu, d_out, Some(d_x), &Exec::default())
                .is_err()
        };
        assert!(!run(&[0.0; 2], &[0.0; 2], &mut [0.0; 2]));
        assert!(run(&[0.0; 3], &[0.0; 2], &mut [0.0; 2]));
        assert!(run(&[0.0; 2], &[0.0; 1], &mut [0.0; 2]));
        assert!(run(&[0.0; 2], &[0.0; 2], &mut [0.0; 1]));
    }
}

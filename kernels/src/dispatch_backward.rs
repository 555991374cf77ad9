//! Gradients through sparse dispatch.

use crate::activation::Activation;
use crate::dense::Into;
use crate::dispatch::{ExpertView, group};
use crate::error::KernelError;
use crate::exec::Exec;
use crate::linear::linear;
use crate::linear_backward::linear_backward;
use crate::routing::Routing;

/// Gradients of [`crate::moe_forward`] with respect to its input and to the weights of the chosen slots.
///
/// For a pair of token `t` and expert `e` with weight `w`: `a = down_eᵀ d_out[t]`; `g`, `u` are computed again; `dw = a . f(g) u`,
/// `dx[t] += gate_eᵀ (w a u f'(g)) + up_eᵀ (w a f(g))`, pairs in slot order.
///
/// * `x`, `d_out`, `d_x` (overwritten; left out where it is not wanted): `[tokens, hidden]`
/// * returns the gradient of the weights, `[tokens, top_k]`
/// * f32 sums; the same bits for any number of threads
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
) -> Result<Vec<f32>, KernelError> {
    let (tokens, k) = (routing.tokens, routing.top_k);
    KernelError::check("routing ids", tokens * k, routing.ids.len())?;
    KernelError::check("routing weights", tokens * k, routing.weights.len())?;
    let hidden = experts.first().map_or(0, |e| e.gate.cols());
    KernelError::check("expert input", tokens * hidden, x.len())?;
    KernelError::check("gradient of expert output", tokens * hidden, d_out.len())?;
    if let Some(d_x) = &d_x {
        KernelError::check("gradient of expert input", tokens * hidden, d_x.len())?;
    }
    let groups = group(routing, experts.len())?;
    let mut d_weights = vec![0.0; tokens * k];
    let mut d_pairs = vec![0.0; if d_x.is_some() { tokens * k * hidden } else { 0 }]; // [pairs by expert, hidden]
    for (e, expert) in experts.iter().enumerate() {
        let (from, to) = (groups.offsets[e] as usize, groups.offsets[e + 1] as usize);
        if from == to {
            continue;
        }
        let pairs = &groups.order[from..to];
        let gather = |rows: &[f32]| {
            let mut gathered = Vec::with_capacity(pairs.len() * hidden);
            for pair in pairs {
                gathered.extend_from_slice(&rows[*pair as usize / k * hidden..][..hidden]);
            }
            gathered
        };
        let inter = expert.gate.rows();
        let (input, d_rows) = (gather(x), gather(d_out));
        let (mut gate, mut up) = (vec![0.0; (to - from) * inter], vec![0.0; (to - from) * inter]);
        linear(&input, expert.gate, None, &mut gate, &crate::Exec::default())?;
        linear(&input, expert.up, None, &mut up, &crate::Exec::default())?;
        let mut d_h = vec![0.0; (to - from) * inter];
        linear_backward(&d_rows, expert.down, &mut d_h, Into::Overwrite, &Exec::default())?;
        // a . f(g) u is (a f(g)) . u: the gradient of `up`, before its weight, gives that of the weight.
        let (mut d_gate, mut d_up) = (gate, up.clone());
        activation.gate_backward(&mut d_gate, &mut d_up, &d_h);
        for (i, &pair) in pairs.iter().enumerate() {
            let (weight, row) = (routing.weights[pair as usize], i * inter..(i + 1) * inter);
            let (d_gate, d_up) = (&mut d_gate[row.clone()], &mut d_up[row.clone()]);
            d_weights[pair as usize] = dot(d_up, &up[row]);
            d_gate.iter_mut().for_each(|d| *d *= weight);
            d_up.iter_mut().for_each(|d| *d *= weight);
        }
        if d_x.is_some() {
            let d_rows = &mut d_pairs[from * hidden..to * hidden];
            linear_backward(&d_gate, expert.gate, d_rows, Into::Overwrite, &Exec::default())?;
            linear_backward(&d_up, expert.up, d_rows, Into::Add, &Exec::default())?;
        }
    }
    if let Some(d_x) = d_x
        && hidden > 0
    {
        for (token, d_x) in d_x.chunks_exact_mut(hidden).enumerate() {
            d_x.fill(0.0);
            for at in &groups.inverse[token * k..(token + 1) * k] {
                let row = &d_pairs[*at as usize * hidden..][..hidden];
                d_x.iter_mut().zip(row).for_each(|(o, v)| *o += v);
            }
        }
    }
    Ok(d_weights)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, MatView, RouterSpec, cast, route};

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
        for (count, k) in [(3, 1), (3, 2), (3, 3), (1, 1)] {
            let stored = experts(count, hidden, inter);
            let (x, d_out) = (numbers(tokens * hidden, 50), numbers(tokens * hidden, 60));
            let logits = numbers(tokens * count, 70);
            let spec = RouterSpec { renormalise: false, ..RouterSpec::softmax(k) };
            let routing = route(&logits, tokens, count, None, &spec).unwrap();
            let views = views(&stored, hidden, inter);
            let mut d_x = vec![f32::NAN; x.len()];
            let silu = Activation::Silu;
            let found = moe_backward(&x, &routing, &views, silu, &d_out, Some(&mut d_x)).unwrap();
            let alone = moe_backward(&x, &routing, &views, silu, &d_out, None).unwrap();
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
                .install(|| moe_backward(&x, &routing, &views, gelu, &d_out, Some(&mut d_x)))
                .unwrap();
            d_x.iter().chain(&dw).map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let stored = experts(1, 2, 2);
        let views = views(&stored, 2, 2);
        let routing = Routing { tokens: 1, top_k: 1, ids: vec![0], weights: vec![1.0] };
        let run = |x: &[f32], d_out: &[f32], d_x: &mut [f32]| {
            moe_backward(x, &routing, &views, Activation::Silu, d_out, Some(d_x)).is_err()
        };
        assert!(!run(&[0.0; 2], &[0.0; 2], &mut [0.0; 2]));
        assert!(run(&[0.0; 3], &[0.0; 2], &mut [0.0; 2]));
        assert!(run(&[0.0; 2], &[0.0; 1], &mut [0.0; 2]));
        assert!(run(&[0.0; 2], &[0.0; 2], &mut [0.0; 1]));
    }
}

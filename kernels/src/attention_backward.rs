//! Gradients through causal attention.

use crate::attention::panel::{KEYS, LOWEST, Panel, QUERIES, soften};
use crate::attention::prefill::Step;
use crate::attention::{AttentionSpec, KeyValues};
use crate::dense::Into;
use crate::error::KernelError;
use crate::exec::{Exec, Isa};
use crate::product::{Left, product};
use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};
use crate::transpose::transpose;
use crate::vector::{Job, Vector, run};

/// Tasks there are at least where sizes allow it; each has sums of its own for keys and values. Fixed, so that the split
/// (and with it every bit of the result) does not depend on the number of threads.
const TASKS: usize = 16;

/// Multiply-adds below which handing work to other threads costs more than it gains.
const ALONE_BELOW: usize = 1 << 20;

/// Gradients of [`crate::attention()`] over one whole sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionGradients {
    /// `[tokens, heads * qk_dim]`.
    pub q: Vec<f32>,
    /// `[tokens, kv_heads * qk_dim]`.
    pub k: Vec<f32>,
    /// `[tokens, kv_heads * v_dim]`.
    pub v: Vec<f32>,
}

/// Gradients of [`crate::attention()`] of a sequence to itself, with respect to queries, keys and values.
///
/// Probabilities `p` are computed again from the logarithm of each query's sum, block by block: no matrix of scores is kept.
/// With `do` the gradient of the output `o`, `dp = do vᵀ`, `ds = p (dp - do . o)` (times `1 - (s / cap)^2` under a
/// softcap), `dq = scale ds k`, `dk = scale dsᵀ q`, `dv = pᵀ do`; key-value heads add up over the query heads they serve,
/// in order.
///
/// * `q`: `[tokens, heads * qk_dim]`; `k`: `[tokens, kv_heads * qk_dim]`; `v`: `[tokens, kv_heads * v_dim]`; `out` (what
///   attention gave) and `d_out`: `[tokens, heads * v_dim]`
/// * f32 sums; the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if a slice does not fit the sizes.
///
/// # Source
/// Dao, FlashAttention-2 (2023), algorithm 2; there the sums of the forward pass are kept, here they are made again.
pub fn attention_backward(
    [q, k, v]: [&[f32]; 3],
    out: &[f32],
    d_out: &[f32],
    spec: &AttentionSpec,
    exec: &Exec,
) -> Result<AttentionGradients, KernelError> {
    let AttentionSpec { heads, kv_heads, qk_dim, v_dim, .. } = *spec;
    let tokens = q.len().checked_div(heads * qk_dim).unwrap_or(0);
    let whole = if kv_heads == 0 { 1 } else { heads - heads % kv_heads };
    KernelError::check("heads, a multiple of key-value heads", whole, heads)?;
    KernelError::check("queries", tokens * heads * qk_dim, q.len())?;
    KernelError::check("keys", tokens * kv_heads * qk_dim, k.len())?;
    KernelError::check("values", tokens * kv_heads * v_dim, v.len())?;
    KernelError::check("attention output", tokens * heads * v_dim, out.len())?;
    KernelError::check("gradient of attention", tokens * heads * v_dim, d_out.len())?;
    let mut sum =
        AttentionGradients { q: vec![0.0; q.len()], k: vec![0.0; k.len()], v: vec![0.0; v.len()] };
    if q.is_empty() {
        return Ok(sum);
    }
    let kv = KeyValues {
        keys: k,
        values: v,
        count: tokens,
        key_strides: (kv_heads * qk_dim, qk_dim),
        value_strides: (kv_heads * v_dim, v_dim),
    };
    let work = Work { q, kv, out, d_out, spec, isa: exec.isa };
    // Panels of all queries of a group, dealt out to `chunks` tasks like cards: late ones see more keys.
    let (group, panels) = (heads / kv_heads, tokens.div_ceil(QUERIES));
    let chunks = TASKS.div_ceil(kv_heads).min(group * panels);
    let size = tokens * (qk_dim + v_dim);
    let mut parts = Scratch::zeroed(kv_heads * chunks * size); // [kv_heads, chunks, (dk, dv)]
    let (d_q, d_kv) = (Parts::new(&mut sum.q), Parts::new(&mut parts));
    let shared = tokens * tokens * heads * (qk_dim + v_dim) >= ALONE_BELOW;
    for_each(kv_heads * chunks, shared, |task| {
        // SAFETY: the sums of this task.
        let (d_k, d_v) = unsafe { d_kv.range(task * size, size) }.split_at_mut(tokens * qk_dim);
        let (kv_head, chunk) = (task / chunks, task % chunks);
        for item in (chunk..group * panels).step_by(chunks) {
            let (head, first) = (kv_head * group + item % group, item / group * QUERIES);
            let rows = work.panel(head, kv_head, first, d_k, d_v);
            for (i, row) in rows.chunks_exact(qk_dim).enumerate() {
                // SAFETY: each query of each head belongs to one item of one task.
                let out = unsafe { d_q.range(((first + i) * heads + head) * qk_dim, qk_dim) };
                out.copy_from_slice(row);
            }
        }
    });
    for (kv_head, parts) in parts.chunks_exact(chunks * size).enumerate() {
        for part in parts.chunks_exact(size) {
            let (d_k, d_v) = part.split_at(tokens * qk_dim);
            add_columns(&mut sum.k, kv_heads * qk_dim, kv_head * qk_dim, d_k, qk_dim);
            add_columns(&mut sum.v, kv_heads * v_dim, kv_head * v_dim, d_v, v_dim);
        }
    }
    sum.k.iter_mut().for_each(|d| *d *= spec.scale);
    Ok(sum)
}

/// `all[:, from..from + dim] += part`, `all` with rows of `width`.
fn add_columns(all: &mut [f32], width: usize, from: usize, part: &[f32], dim: usize) {
    if dim == 0 {
        return;
    }
    for (all, part) in all.chunks_exact_mut(width).zip(part.chunks_exact(dim)) {
        all[from..from + dim].iter_mut().zip(part).for_each(|(a, p)| *a += p);
    }
}

/// What every task reads.
struct Work<'a> {
    q: &'a [f32],
    kv: KeyValues<'a>,
    out: &'a [f32],
    d_out: &'a [f32],
    spec: &'a AttentionSpec,
    isa: Isa,
}

impl Work<'_> {
    /// The queries of `head` from `first` on: adds to `d_k [tokens, qk_dim]` (without the scale) and `d_v [tokens, v_dim]`,
    /// returns the gradient of the queries `[count, qk_dim]`.
    fn panel(
        &self,
        head: usize,
        kv_head: usize,
        first: usize,
        d_k: &mut [f32],
        d_v: &mut [f32],
    ) -> Scratch {
        let Work { q, kv, out, d_out, spec, isa } = self;
        let AttentionSpec { heads, qk_dim, v_dim, .. } = **spec;
        let panel = Panel::new(first, QUERIES.min(kv.count - first), spec);
        let (lanes, count) = (panel.lanes, panel.count);
        let (q_width, v_width) = (heads * qk_dim, heads * v_dim);
        let turned_q = panel.turned(*isa, (q, q_width), (first, head * qk_dim), qk_dim, spec.scale);
        let at = (first, head * v_dim);
        let turned_d = panel.turned(*isa, (d_out, v_width), at, v_dim, 1.0);
        let mut delta = [0.0; QUERIES];
        let turned_out = panel.turned(*isa, (out, v_width), at, v_dim, 1.0);
        for (d, o) in turned_d.chunks_exact(lanes).zip(turned_out.chunks_exact(lanes)) {
            for ((delta, d), o) in delta.iter_mut().zip(d).zip(o) {
                *delta += d * o;
            }
        }
        let mut p = Scratch::new(KEYS * lanes); // [keys, lanes]
        let mut ds = Scratch::new(KEYS * lanes); // [keys, lanes]
        let log_sums = self.log_sums(panel, &turned_q, kv_head, &mut p);
        let mut d_q = Scratch::zeroed(qk_dim * lanes); // [qk_dim, lanes]
        for keys in panel.blocks() {
            let n = keys.len();
            let (p, ds) = (&mut p[..n * lanes], &mut ds[..n * lanes]);
            self.scores(panel, &turned_q, kv_head, keys.start, p);
            let (row, next) = kv.value_strides;
            let values =
                Left { data: &kv.values[kv_head * next + keys.start * row..], row, col: 1 };
            let sizes = (n, v_dim, lanes);
            product(*isa, sizes, values, (&turned_d, lanes), (ds, lanes), Into::Overwrite);
            let cap = spec.softcap;
            run(*isa, Slopes { p, ds, log_sums: &log_sums[..lanes], delta: &delta[..lanes], cap });
            panel.mask(keys.clone(), p, 0.0);
            panel.mask(keys.clone(), ds, 0.0);
            let (row, next) = kv.key_strides;
            let data = &kv.keys[kv_head * next + keys.start * row..];
            let left = Left { data, row: 1, col: row };
            product(*isa, (qk_dim, n, lanes), left, (ds, lanes), (&mut d_q, lanes), Into::Add);
            let d_k = &mut d_k[keys.start * qk_dim..];
            let queries = (&q[first * q_width + head * qk_dim..], q_width);
            product(
                *isa,
                (n, count, qk_dim),
                Left::rows(ds, lanes),
                queries,
                (d_k, qk_dim),
                Into::Add,
            );
            let d_v = &mut d_v[keys.start * v_dim..];
            let d_out = (&d_out[first * v_width + head * v_dim..], v_width);
            product(*isa, (n, count, v_dim), Left::rows(p, lanes), d_out, (d_v, v_dim), Into::Add);
        }
        d_q.iter_mut().for_each(|d| *d *= spec.scale);
        let mut rows = Scratch::new(count * qk_dim);
        transpose(*isa, (qk_dim, count), (&d_q, lanes), (&mut rows, qk_dim));
        rows
    }

    /// Scores `[keys, lanes]` of the keys from `from` on, under the softcap but not masked.
    fn scores(&self, panel: Panel, q: &[f32], kv_head: usize, from: usize, scores: &mut [f32]) {
        let keys = from..from + scores.len() / panel.lanes;
        panel.scores(self.isa, &self.kv, kv_head, keys, q, scores);
        if let Some(cap) = self.spec.softcap {
            soften(self.isa, scores, cap);
        }
    }

    /// Logarithm of each query's sum of `exp(score)`.
    fn log_sums(
        &self,
        panel: Panel,
        q: &[f32],
        kv_head: usize,
        room: &mut [f32],
    ) -> [f32; QUERIES] {
        let (mut max, mut total) = ([LOWEST; QUERIES], [0.0; QUERIES]);
        for keys in panel.blocks() {
            let scores = &mut room[..keys.len() * panel.lanes];
            self.scores(panel, q, kv_head, keys.start, scores);
            panel.mask(keys, scores, f32::NEG_INFINITY);
            let (max, total) = (&mut max[..panel.lanes], &mut total[..panel.lanes]);
            run(self.isa, Step { scores, max, total, sums: &mut [] });
        }
        for (max, total) in max.iter_mut().zip(&total) {
            *max += total.ln();
        }
        max
    }
}

/// From scores and `dp` to `p = exp(score - log_sum)` and `ds = p (dp - delta) (1 - (score / cap)^2)`.
struct Slopes<'a> {
    /// Scores at first, `[keys, lanes]`.
    p: &'a mut [f32],
    /// `dp` at first, `[keys, lanes]`.
    ds: &'a mut [f32],
    /// `[lanes]`.
    log_sums: &'a [f32],
    /// `[lanes]`.
    delta: &'a [f32],
    cap: Option<f32>,
}

impl Job for Slopes<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let Slopes { p, ds, log_sums, delta, cap } = self;
        let lanes = delta.len();
        let bend = cap.map_or(0.0, |cap| -1.0 / (cap * cap));
        for at in (0..lanes).step_by(S::N) {
            // SAFETY: `lanes` is a multiple of `N`, every row has so many numbers, and the processor has the set.
            unsafe {
                let log_sum = S::load(log_sums[at..].as_ptr());
                let delta = S::load(delta[at..].as_ptr());
                for (p, ds) in p.chunks_exact_mut(lanes).zip(ds.chunks_exact_mut(lanes)) {
                    let (p, ds) = (p.as_mut_ptr().add(at), ds.as_mut_ptr().add(at));
                    let score = S::load(p);
                    let probability = S::exp(S::sub(score, log_sum));
                    let slope = S::fma(S::mul(score, score), S::splat(bend), S::splat(1.0));
                    let back = S::mul(probability, S::sub(S::load(ds), delta));
                    S::store(ds, S::mul(back, slope));
                    S::store(p, probability);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    /// Gradients, with the output that attention gives.
    fn gradients(
        [q, k, v]: [&[f32]; 3],
        d_out: &[f32],
        s: &AttentionSpec,
        exec: &Exec,
    ) -> AttentionGradients {
        let kv = KeyValues {
            keys: k,
            values: v,
            count: k.len() / (s.kv_heads * s.qk_dim),
            key_strides: (s.kv_heads * s.qk_dim, s.qk_dim),
            value_strides: (s.kv_heads * s.v_dim, s.v_dim),
        };
        let mut out = vec![0.0; d_out.len()];
        crate::attention(q, kv, s, &mut out, exec).unwrap();
        attention_backward([q, k, v], &out, d_out, s, exec).unwrap()
    }

    /// `sum(d_out . attention(q, k, v))` by the formula, in f64.
    fn value(q: &[f64], k: &[f64], v: &[f64], d_out: &[f32], s: &AttentionSpec) -> f64 {
        let tokens = q.len() / (s.heads * s.qk_dim);
        let mut sum = 0.0;
        for t in 0..tokens {
            let from = (t + 1).saturating_sub(s.window.unwrap_or(usize::MAX));
            for h in 0..s.heads {
                let g = h * s.kv_heads / s.heads;
                let score = |j: usize| {
                    let at = |i: usize, heads: usize, h: usize| (i * heads + h) * s.qk_dim;
                    let dot: f64 = (0..s.qk_dim)
                        .map(|d| q[at(t, s.heads, h) + d] * k[at(j, s.kv_heads, g) + d])
                        .sum();
                    let z = dot * f64::from(s.scale);
                    s.softcap.map_or(z, |c| f64::from(c) * (z / f64::from(c)).tanh()).exp()
                };
                let total: f64 = (from..=t).map(score).sum();
                for j in from..=t {
                    let p = score(j) / total;
                    for d in 0..s.v_dim {
                        sum += p
                            * v[(j * s.kv_heads + g) * s.v_dim + d]
                            * f64::from(d_out[(t * s.heads + h) * s.v_dim + d]);
                    }
                }
            }
        }
        sum
    }

    #[test]
    fn equals_differences() {
        for (heads, kv_heads, window, softcap) in [
            (2, 2, None, None),
            (4, 2, Some(3), None),
            (3, 1, None, Some(0.8)),
            (1, 1, Some(1), None),
        ] {
            let (tokens, qk_dim, v_dim) = (7, 3, 2);
            let s = AttentionSpec { heads, kv_heads, qk_dim, v_dim, scale: 0.9, softcap, window };
            let q = numbers(tokens * heads * qk_dim, 1);
            let k = numbers(tokens * kv_heads * qk_dim, 2);
            let v = numbers(tokens * kv_heads * v_dim, 3);
            let d_out = numbers(tokens * heads * v_dim, 4);
            let wide = |x: &[f32]| x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let inputs = [wide(&q), wide(&k), wide(&v)];
            let sets = Isa::ALL.into_iter().filter(|isa| isa.available());
            let found: Vec<_> = sets
                .map(|isa| gradients([&q, &k, &v], &d_out, &s, &Exec::on(isa).unwrap()))
                .collect();
            for which in 0..3 {
                for i in 0..inputs[which].len() {
                    let moved = |by: f64| {
                        let mut inputs = inputs.clone();
                        inputs[which][i] += by;
                        value(&inputs[0], &inputs[1], &inputs[2], &d_out, &s)
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    for found in &found {
                        let found = [&found.q, &found.k, &found.v][which][i];
                        let error = (f64::from(found) - slope).abs();
                        assert!(error < 1e-5, "{which} {i} {found} {slope}");
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_of_queries_add_up_and_threads_do_not_matter() {
        let s = AttentionSpec {
            heads: 4,
            kv_heads: 2,
            qk_dim: 8,
            v_dim: 8,
            scale: 0.3,
            softcap: None,
            window: Some(70),
        };
        let tokens = 150;
        let (q, k, v, d_out) = (
            numbers(tokens * 32, 1),
            numbers(tokens * 16, 2),
            numbers(tokens * 16, 3),
            numbers(tokens * 32, 4),
        );
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| gradients([&q, &k, &v], &d_out, &s, &Exec::default()))
        };
        let found = run(1);
        assert_eq!(found, run(2));
        assert_eq!(found, run(3));
        let wide = |x: &[f32]| x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
        let (q, v) = (wide(&q), wide(&v));
        for i in [0, 63 * 16 + 5, 64 * 16 + 9, 2399] {
            let moved = |by: f64| {
                let mut k = wide(&k);
                k[i] += by;
                value(&q, &k, &v, &d_out, &s)
            };
            let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            assert!((f64::from(found.k[i]) - slope).abs() < 1e-4, "{i} {} {slope}", found.k[i]);
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let s = AttentionSpec {
            heads: 2,
            kv_heads: 1,
            qk_dim: 2,
            v_dim: 2,
            scale: 1.0,
            softcap: None,
            window: None,
        };
        let (x, y) = ([0.0; 8], [0.0; 4]);
        let run = |q: &[f32], k: &[f32], out: &[f32], d_out: &[f32], s: &AttentionSpec| {
            attention_backward([q, k, &y], out, d_out, s, &Exec::default()).is_ok()
        };
        assert!(run(&x, &y, &x, &x, &s));
        assert!(!run(&x[..7], &y, &x, &x, &s));
        assert!(!run(&x, &y[..3], &x, &x, &s));
        assert!(!run(&x, &y, &y, &x, &s));
        assert!(!run(&x, &y, &x, &y, &s));
        let three = AttentionSpec { heads: 3, kv_heads: 2, ..s };
        assert!(attention_backward([&[]; 3], &[], &[], &three, &Exec::default()).is_err());
    }
}

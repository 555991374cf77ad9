//! Gradients through causal attention.

use std::ops::Range;

use rayon::prelude::*;

use crate::attention::AttentionSpec;
use crate::dense::{Dense, Into, matmul};
use crate::error::KernelError;
use crate::norm::softmax;

/// Queries whose scores are held at a time.
const QUERIES: usize = 64;

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
/// Probabilities `p` are computed again, block by block: no score matrix is kept. With `do` the gradient of the output,
/// `dp = do vᵀ`, `ds = p (dp - p . dp)` (times `1 - (s / cap)^2` under a softcap), `dq = scale ds k`, `dk = scale dsᵀ q`,
/// `dv = pᵀ do`; key-value heads add up over the query heads they serve, in order.
///
/// * `q`: `[tokens, heads * qk_dim]`; `k`: `[tokens, kv_heads * qk_dim]`; `v`: `[tokens, kv_heads * v_dim]`; `d_out`:
///   `[tokens, heads * v_dim]`; f32 sums; the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if a slice does not fit the sizes.
pub fn attention_backward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    d_out: &[f32],
    spec: &AttentionSpec,
) -> Result<AttentionGradients, KernelError> {
    let AttentionSpec { heads, kv_heads, qk_dim, v_dim, .. } = *spec;
    let tokens = q.len().checked_div(heads * qk_dim).unwrap_or(0);
    let groups = if kv_heads == 0 { 1 } else { heads - heads % kv_heads };
    KernelError::check("heads, a multiple of key-value heads", groups, heads)?;
    KernelError::check("queries", tokens * heads * qk_dim, q.len())?;
    KernelError::check("keys", tokens * kv_heads * qk_dim, k.len())?;
    KernelError::check("values", tokens * kv_heads * v_dim, v.len())?;
    KernelError::check("gradient of attention", tokens * heads * v_dim, d_out.len())?;
    let task = |head: usize| head_gradients(q, k, v, d_out, spec, tokens, head);
    let parts: Vec<AttentionGradients> = if tokens * tokens * heads * (qk_dim + v_dim) < 1 << 18 {
        (0..heads).map(task).collect::<Result<_, _>>()?
    } else {
        (0..heads).into_par_iter().map(task).collect::<Result<_, _>>()?
    };
    let mut sum =
        AttentionGradients { q: vec![0.0; q.len()], k: vec![0.0; k.len()], v: vec![0.0; v.len()] };
    for (head, part) in parts.iter().enumerate() {
        let group = head * kv_heads / heads;
        add_columns(&mut sum.q, heads * qk_dim, head * qk_dim, &part.q, qk_dim);
        add_columns(&mut sum.k, kv_heads * qk_dim, group * qk_dim, &part.k, qk_dim);
        add_columns(&mut sum.v, kv_heads * v_dim, group * v_dim, &part.v, v_dim);
    }
    Ok(sum)
}

/// `all[:, from..from + dim] += part`, `all` with rows of `width`.
fn add_columns(all: &mut [f32], width: usize, from: usize, part: &[f32], dim: usize) {
    for (row, part) in all.chunks_exact_mut(width.max(1)).zip(part.chunks_exact(dim.max(1))) {
        row[from..from + dim].iter_mut().zip(part).for_each(|(o, v)| *o += v);
    }
}

/// What one query head gives: `q`, `k`, `v` are `[tokens, dim]` here.
fn head_gradients(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    d_out: &[f32],
    spec: &AttentionSpec,
    tokens: usize,
    head: usize,
) -> Result<AttentionGradients, KernelError> {
    let AttentionSpec { heads, kv_heads, qk_dim, v_dim, scale, .. } = *spec;
    let group = head * kv_heads / heads;
    let part = |data, rows: &Range<usize>, heads: usize, head: usize, dim: usize| {
        columns_of_rows(data, rows, heads * dim, head * dim..(head + 1) * dim)
    };
    let mut sum = AttentionGradients {
        q: vec![0.0; tokens * qk_dim],
        k: vec![0.0; tokens * qk_dim],
        v: vec![0.0; tokens * v_dim],
    };
    for from in (0..tokens).step_by(QUERIES) {
        let rows = from..tokens.min(from + QUERIES);
        let keys = (from + 1).saturating_sub(spec.window.unwrap_or(usize::MAX))..rows.end;
        let queries = part(q, &rows, heads, head, qk_dim)?;
        let d_out = part(d_out, &rows, heads, head, v_dim)?;
        let k = part(k, &keys, kv_heads, group, qk_dim)?;
        let v = part(v, &keys, kv_heads, group, v_dim)?;
        let mut p = vec![0.0; rows.len() * keys.len()]; // [queries, keys]
        matmul(queries, k.transposed(), &mut p, Into::Overwrite)?;
        let slope = probabilities(&mut p, &rows, &keys, spec);
        let mut ds = vec![0.0; p.len()];
        matmul(d_out, v.transposed(), &mut ds, Into::Overwrite)?;
        for (p, ds) in p.chunks_exact(keys.len()).zip(ds.chunks_exact_mut(keys.len())) {
            let mean: f64 = p.iter().zip(&*ds).map(|(p, d)| f64::from(*p) * f64::from(*d)).sum();
            ds.iter_mut().zip(p).for_each(|(d, p)| *d = scale * p * (*d - mean as f32));
        }
        if let Some(slope) = slope {
            ds.iter_mut().zip(slope).for_each(|(d, s)| *d *= s);
        }
        let p = Dense::new(&p, rows.len(), keys.len())?;
        let ds = Dense::new(&ds, rows.len(), keys.len())?;
        let (kq, kv) =
            (keys.start * qk_dim..keys.end * qk_dim, keys.start * v_dim..keys.end * v_dim);
        matmul(ds, k, &mut sum.q[from * qk_dim..rows.end * qk_dim], Into::Overwrite)?;
        matmul(ds.transposed(), queries, &mut sum.k[kq], Into::Add)?;
        matmul(p.transposed(), d_out, &mut sum.v[kv], Into::Add)?;
    }
    Ok(sum)
}

/// Rows and columns of a row-major matrix with rows of `width`.
fn columns_of_rows<'a>(
    data: &'a [f32],
    rows: &Range<usize>,
    width: usize,
    columns: Range<usize>,
) -> Result<Dense<'a, f32>, KernelError> {
    let data = &data[rows.start * width..rows.end * width];
    Ok(Dense::new(data, rows.len(), width)?.columns(columns))
}

/// Turns products `[queries, keys]` into probabilities; returns the slope of the softcap where there is one.
fn probabilities(
    scores: &mut [f32],
    rows: &Range<usize>,
    keys: &Range<usize>,
    spec: &AttentionSpec,
) -> Option<Vec<f32>> {
    scores.iter_mut().for_each(|s| *s *= spec.scale);
    let slope = spec.softcap.map(|cap| {
        let bent = |s: &mut f32| {
            let t = (*s / cap).tanh();
            *s = cap * t;
            1.0 - t * t
        };
        scores.iter_mut().map(bent).collect()
    });
    for (position, scores) in rows.clone().zip(scores.chunks_exact_mut(keys.len())) {
        let from = (position + 1).saturating_sub(spec.window.unwrap_or(usize::MAX)) - keys.start;
        let seen = from..position + 1 - keys.start;
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        softmax(&mut scores[seen]);
    }
    slope
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
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
            let found = attention_backward(&q, &k, &v, &d_out, &s).unwrap();
            let wide = |x: &[f32]| x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let inputs = [wide(&q), wide(&k), wide(&v)];
            for (which, found) in [&found.q, &found.k, &found.v].into_iter().enumerate() {
                for (i, found) in found.iter().enumerate() {
                    let moved = |by: f64| {
                        let mut inputs = inputs.clone();
                        inputs[which][i] += by;
                        value(&inputs[0], &inputs[1], &inputs[2], &d_out, &s)
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    assert!(
                        (f64::from(*found) - slope).abs() < 1e-5,
                        "{which} {i} {found} {slope}"
                    );
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
            pool.install(|| attention_backward(&q, &k, &v, &d_out, &s)).unwrap()
        };
        let found = run(1);
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
        assert!(attention_backward(&x, &y, &y, &x, &s).is_ok());
        assert!(attention_backward(&x[..7], &y, &y, &x, &s).is_err());
        assert!(attention_backward(&x, &y[..3], &y, &x, &s).is_err());
        assert!(attention_backward(&x, &y, &y, &y, &s).is_err());
        let three = AttentionSpec { heads: 3, kv_heads: 2, ..s };
        assert!(attention_backward(&[], &[], &[], &[], &three).is_err());
    }
}

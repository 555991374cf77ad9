//! Causal attention with grouped key-value heads.

use rayon::prelude::*;

use crate::Dtype;
use crate::dot::dot_for;
use crate::error::KernelError;
use crate::norm::softmax;

/// Queries of one task: bounds the scratch to `QUERIES * keys` scores per thread.
const QUERIES: usize = 64;

/// From this many queries on, scores are matrix products.
const GEMM_FROM: usize = 4;

/// Sizes and options of one attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Dimensions of a query or key head.
    pub qk_dim: usize,
    /// Dimensions of a value head.
    pub v_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `score = cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// A query sees itself and the `window - 1` positions before it.
    pub window: Option<usize>,
}

/// Keys and values at any strides: a flat projection `[keys, kv_heads * dim]`, or a cache `[kv_heads, capacity, dim]`.
#[derive(Debug, Clone, Copy)]
pub struct KeyValues<'a> {
    /// Key numbers.
    pub keys: &'a [f32],
    /// Value numbers.
    pub values: &'a [f32],
    /// Positions there are.
    pub count: usize,
    /// From one position to the next, and from one head to the next, in `keys`.
    pub key_strides: (usize, usize),
    /// The same in `values`.
    pub value_strides: (usize, usize),
}

/// Attention of `tokens` queries, the last of which stands at the last key.
///
/// `out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, g]) v[j, g]`, `g = h * kv_heads / heads`, over the keys
/// `j` at or before the position of `t` and inside the window.
///
/// * `q`: `[tokens, heads * qk_dim]`; `out`: `[tokens, heads * v_dim]`; f32 sums
/// * the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if a slice does not fit the sizes.
pub fn attention(
    q: &[f32],
    kv: KeyValues<'_>,
    spec: &AttentionSpec,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let AttentionSpec { heads, kv_heads, qk_dim, v_dim, .. } = *spec;
    let tokens = q.len() / (heads * qk_dim).max(1);
    KernelError::check("queries", tokens * heads * qk_dim, q.len())?;
    KernelError::check("attention output", tokens * heads * v_dim, out.len())?;
    let reach = |strides: (usize, usize), dim| {
        kv.count.saturating_sub(1) * strides.0 + kv_heads.saturating_sub(1) * strides.1 + dim
    };
    for (what, needed, found) in [
        ("keys", reach(kv.key_strides, qk_dim), kv.keys.len()),
        ("values", reach(kv.value_strides, v_dim), kv.values.len()),
        ("key positions", tokens, kv.count),
        ("heads in each group", kv_heads, if kv_heads == 0 { 1 } else { heads - heads % kv_heads }),
    ] {
        if found < needed {
            return Err(KernelError::Length { what, expected: needed, found });
        }
    }
    if tokens == 0 {
        return Ok(());
    }
    KernelError::check("heads, a multiple of key-value heads", heads - heads % kv_heads, heads)?;
    let blocks = tokens.div_ceil(QUERIES);
    let start = kv.count - tokens;
    let task = |index: usize| {
        let (head, block) = (index / blocks, index % blocks);
        let queries = block * QUERIES..tokens.min((block + 1) * QUERIES);
        let rows = queries.len();
        let mut result = vec![0.0; rows * v_dim];
        head_block(q, kv, spec, head, queries, start, &mut result);
        (head, block * QUERIES, result)
    };
    let place = |out: &mut [f32], (head, first, result): (usize, usize, Vec<f32>)| {
        for (i, row) in result.chunks_exact(v_dim.max(1)).enumerate() {
            let at = ((first + i) * heads + head) * v_dim;
            out[at..at + v_dim].copy_from_slice(row);
        }
    };
    if tokens * kv.count * heads * (qk_dim + v_dim) < 1 << 18 {
        (0..heads * blocks).for_each(|i| place(out, task(i)));
    } else {
        let results: Vec<_> = (0..heads * blocks).into_par_iter().map(task).collect();
        results.into_iter().for_each(|r| place(out, r));
    }
    Ok(())
}

/// One head, some queries: scores, mask, softmax, weighted values.
fn head_block(
    q: &[f32],
    kv: KeyValues<'_>,
    spec: &AttentionSpec,
    head: usize,
    queries: std::ops::Range<usize>,
    start: usize,
    out: &mut [f32],
) {
    let AttentionSpec { heads, kv_heads, qk_dim, v_dim, scale, softcap, window } = *spec;
    let group = head * kv_heads / heads;
    let window = window.unwrap_or(usize::MAX);
    let first_key = (start + queries.start + 1).saturating_sub(window);
    let end_key = start + queries.end;
    let (rows, keys) = (queries.len(), end_key - first_key);
    let q = &q[(queries.start * heads + head) * qk_dim..];
    let k = &kv.keys[group * kv.key_strides.1 + first_key * kv.key_strides.0..];
    let v = &kv.values[group * kv.value_strides.1 + first_key * kv.value_strides.0..];
    let mut scores = vec![0.0; rows * keys]; // [rows, keys]
    if rows >= GEMM_FROM {
        // SAFETY: `attention` checked that `rows` queries at stride `heads * qk_dim` and `keys` keys at their stride
        // lie in the slices; `scores` is `[rows, keys]`.
        unsafe {
            gemm::gemm(
                rows,
                keys,
                qk_dim,
                scores.as_mut_ptr(),
                1,
                keys as isize,
                false,
                q.as_ptr(),
                1,
                (heads * qk_dim) as isize,
                k.as_ptr(),
                kv.key_strides.0 as isize,
                1,
                0f32,
                scale,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    } else {
        let dot = dot_for(Dtype::F32);
        for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
            let query = &q[row * heads * qk_dim..row * heads * qk_dim + qk_dim];
            for (j, score) in scores.iter_mut().enumerate() {
                let key = &k[j * kv.key_strides.0..j * kv.key_strides.0 + qk_dim];
                *score = dot(bytemuck::cast_slice(key), query) * scale;
            }
        }
    }
    for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
        let position = start + queries.start + row;
        let from = (position + 1).saturating_sub(window) - first_key;
        let seen = from..position + 1 - first_key;
        if let Some(cap) = softcap {
            scores[seen.clone()].iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
        }
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        softmax(&mut scores[seen]);
    }
    if rows >= GEMM_FROM {
        // SAFETY: `scores` is `[rows, keys]`, `keys` values at their stride lie in `v` (checked by `attention`), and
        // `out` is `[rows, v_dim]`.
        unsafe {
            gemm::gemm(
                rows,
                v_dim,
                keys,
                out.as_mut_ptr(),
                1,
                v_dim as isize,
                false,
                scores.as_ptr(),
                1,
                keys as isize,
                v.as_ptr(),
                1,
                kv.value_strides.0 as isize,
                0f32,
                1f32,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    } else {
        for (out, scores) in out.chunks_exact_mut(v_dim.max(1)).zip(scores.chunks_exact(keys)) {
            for (j, weight) in scores.iter().enumerate() {
                let value = &v[j * kv.value_strides.0..j * kv.value_strides.0 + v_dim];
                out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
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

    /// The formula, in f64, key by key.
    fn plain(q: &[f32], k: &[f32], v: &[f32], tokens: usize, s: &AttentionSpec) -> Vec<f64> {
        let keys = k.len() / (s.kv_heads * s.qk_dim);
        let mut out = vec![0.0; tokens * s.heads * s.v_dim];
        for t in 0..tokens {
            let position = keys - tokens + t;
            let from = (position + 1).saturating_sub(s.window.unwrap_or(usize::MAX));
            for h in 0..s.heads {
                let g = h / (s.heads / s.kv_heads);
                let score = |j: usize| {
                    let dot: f64 = (0..s.qk_dim)
                        .map(|d| {
                            q[(t * s.heads + h) * s.qk_dim + d] as f64
                                * k[(j * s.kv_heads + g) * s.qk_dim + d] as f64
                        })
                        .sum();
                    let z = dot * s.scale as f64;
                    s.softcap.map_or(z, |c| c as f64 * (z / c as f64).tanh()).exp()
                };
                let total: f64 = (from..=position).map(score).sum();
                for d in 0..s.v_dim {
                    out[(t * s.heads + h) * s.v_dim + d] = (from..=position)
                        .map(|j| score(j) / total * v[(j * s.kv_heads + g) * s.v_dim + d] as f64)
                        .sum();
                }
            }
        }
        out
    }

    fn flat<'a>(k: &'a [f32], v: &'a [f32], s: &AttentionSpec) -> KeyValues<'a> {
        let (kw, vw) = (s.kv_heads * s.qk_dim, s.kv_heads * s.v_dim);
        KeyValues {
            keys: k,
            values: v,
            count: k.len() / kw,
            key_strides: (kw, s.qk_dim),
            value_strides: (vw, s.v_dim),
        }
    }

    #[test]
    fn equals_the_formula() {
        for (tokens, keys) in [(1, 1), (1, 40), (3, 9), (5, 5), (70, 70), (70, 131)] {
            for (window, softcap) in [(None, None), (Some(1), None), (Some(8), Some(5.0))] {
                let s = AttentionSpec {
                    heads: 4,
                    kv_heads: 2,
                    qk_dim: 6,
                    v_dim: 5,
                    scale: 0.7,
                    softcap,
                    window,
                };
                let (q, k, v) =
                    (numbers(tokens * 24, 1), numbers(keys * 12, 2), numbers(keys * 10, 3));
                let mut out = vec![f32::NAN; tokens * 20];
                attention(&q, flat(&k, &v, &s), &s, &mut out).unwrap();
                for (o, e) in out.iter().zip(plain(&q, &k, &v, tokens, &s)) {
                    assert!((*o as f64 - e).abs() < 1e-5, "{tokens} {keys} {window:?}");
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let s = AttentionSpec {
            heads: 6,
            kv_heads: 2,
            qk_dim: 16,
            v_dim: 16,
            scale: 0.25,
            softcap: None,
            window: None,
        };
        let (q, k, v) = (numbers(150 * 96, 1), numbers(150 * 32, 2), numbers(150 * 32, 3));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; 150 * 96];
            pool.install(|| attention(&q, flat(&k, &v, &s), &s, &mut out)).unwrap();
            out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(2));
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
        let (k, mut out) = ([0.0; 4], [0.0; 12]);
        assert!(attention(&[0.0; 12], flat(&k, &k, &s), &s, &mut out).is_err());
        assert!(attention(&[0.0; 8], flat(&k, &k[..2], &s), &s, &mut out[..8]).is_err());
        assert!(attention(&[0.0; 8], flat(&k, &k, &s), &s, &mut out[..7]).is_err());
    }
}

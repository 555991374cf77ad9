//! Causal attention with grouped key-value heads.

mod decode;
pub(crate) mod panel;
pub(crate) mod prefill;

use crate::Dtype;
use crate::error::KernelError;
use crate::exec::{Batching, Exec};

/// Up to this many queries go over the cache together.
const FEW: usize = 3;

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

/// What keys and values may be kept as.
pub trait KeptNumber: bytemuck::Pod + Send + Sync {
    /// Its dtype: [`Dtype::F32`] or [`Dtype::F16`].
    const DTYPE: Dtype;
}

impl KeptNumber for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl KeptNumber for half::f16 {
    const DTYPE: Dtype = Dtype::F16;
}

/// Keys and values at any strides: a flat projection `[keys, kv_heads * dim]`, or a cache `[kv_heads, capacity, dim]`.
#[derive(Debug, Clone, Copy)]
pub struct KeyValues<'a, T = f32> {
    /// Key numbers.
    pub keys: &'a [T],
    /// Value numbers.
    pub values: &'a [T],
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
/// * the same bits for any number of threads; unless it is [`Batching::Fastest`] also for any number of queries
///
/// # Errors
/// [`KernelError::Length`] if a slice does not fit the sizes.
pub fn attention<T: KeptNumber>(
    q: &[f32],
    kv: KeyValues<'_, T>,
    spec: &AttentionSpec,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    let AttentionSpec { heads, qk_dim, .. } = *spec;
    let tokens = q.len() / (heads * qk_dim).max(1);
    check(q, &[kv], tokens, spec, out)?;
    if tokens == 0 {
        return Ok(());
    }
    match exec.batching {
        Batching::Fastest if tokens <= FEW => {
            decode::decode(q, &[kv], tokens, spec, out, exec.isa);
        }
        Batching::Alone => {
            let width = spec.heads * spec.v_dim;
            for (token, q) in q.chunks_exact(heads * qk_dim).enumerate() {
                let kv = [KeyValues { count: kv.count - tokens + token + 1, ..kv }];
                decode::decode(q, &kv, 1, spec, &mut out[token * width..][..width], exec.isa);
            }
        }
        _ => prefill::prefill(q, kv, spec, tokens, exec, out),
    }
    Ok(())
}

/// Attention of several sequences with one query each, which stands at the last key of its sequence.
///
/// * `q`: `[sequences, heads * qk_dim]`; `out`: `[sequences, heads * v_dim]`
/// * each sequence as [`attention()`] has it by itself, to the bit, whatever the number of threads
///
/// # Errors
/// [`KernelError::Length`] if a slice does not fit the sizes.
pub fn attention_lanes<T: KeptNumber>(
    q: &[f32],
    sequences: &[KeyValues<'_, T>],
    spec: &AttentionSpec,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    check(q, sequences, 1, spec, out)?;
    if exec.batching != Batching::Together && !sequences.is_empty() {
        decode::decode(q, sequences, 1, spec, out, exec.isa);
        return Ok(());
    }
    let (q_width, width) = (spec.heads * spec.qk_dim, spec.heads * spec.v_dim);
    for (i, kv) in sequences.iter().enumerate() {
        let q = &q[i * q_width..(i + 1) * q_width];
        prefill::prefill(q, *kv, spec, 1, exec, &mut out[i * width..(i + 1) * width]);
    }
    Ok(())
}

/// Whether `tokens` queries for each sequence, its keys and values, and the output have the sizes they need.
fn check<T>(
    q: &[f32],
    sequences: &[KeyValues<'_, T>],
    tokens: usize,
    spec: &AttentionSpec,
    out: &[f32],
) -> Result<(), KernelError> {
    let AttentionSpec { heads, kv_heads, qk_dim, v_dim, .. } = *spec;
    let queries = sequences.len() * tokens;
    KernelError::check("queries", queries * heads * qk_dim, q.len())?;
    KernelError::check("attention output", queries * heads * v_dim, out.len())?;
    for kv in sequences {
        let reach = |strides: (usize, usize), dim| {
            kv.count.saturating_sub(1) * strides.0 + kv_heads.saturating_sub(1) * strides.1 + dim
        };
        for (what, needed, found) in [
            ("keys", reach(kv.key_strides, qk_dim), kv.keys.len()),
            ("values", reach(kv.value_strides, v_dim), kv.values.len()),
            ("key positions", tokens, kv.count),
        ] {
            if found < needed {
                return Err(KernelError::Length { what, expected: needed, found });
            }
        }
    }
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        let what = "heads, a multiple of key-value heads";
        let expected = heads.checked_div(kv_heads).map_or(0, |g| g.max(1) * kv_heads);
        return Err(KernelError::Length { what, expected, found: heads });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    pub(super) fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    /// The formula, in f64, key by key.
    pub(super) fn plain(
        q: &[f32],
        k: &[f32],
        v: &[f32],
        tokens: usize,
        s: &AttentionSpec,
    ) -> Vec<f64> {
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

    pub(super) fn flat<'a>(k: &'a [f32], v: &'a [f32], s: &AttentionSpec) -> KeyValues<'a> {
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
        let isas = Isa::ALL.into_iter().filter(|isa| isa.available());
        let sizes = [(1, 1), (1, 40), (3, 9), (5, 5), (70, 70), (70, 131), (33, 230)];
        for (isa, (tokens, keys)) in isas.flat_map(|isa| sizes.map(|sizes| (isa, sizes))) {
            let exec = Exec::on(isa).unwrap();
            for (window, softcap) in
                [(None, None), (Some(1), None), (Some(8), Some(5.0)), (Some(100), None)]
            {
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
                attention(&q, flat(&k, &v, &s), &s, &mut out, &exec).unwrap();
                for (o, e) in out.iter().zip(plain(&q, &k, &v, tokens, &s)) {
                    assert!((*o as f64 - e).abs() < 1e-5, "{isa:?} {tokens} {keys} {window:?}");
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
            pool.install(|| attention(&q, flat(&k, &v, &s), &s, &mut out, &Exec::default()))
                .unwrap();
            out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn a_query_does_not_depend_on_its_neighbours() {
        for window in [None, Some(50)] {
            let s = AttentionSpec {
                heads: 2,
                kv_heads: 1,
                qk_dim: 5,
                v_dim: 7,
                scale: 0.4,
                softcap: Some(3.0),
                window,
            };
            let (q, k, v) = (numbers(230 * 10, 1), numbers(230 * 5, 2), numbers(230 * 7, 3));
            for batching in [Batching::Together, Batching::Alone] {
                let exec = Exec { batching, ..Exec::default() };
                let run = |from: usize, to: usize| {
                    let kv = flat(&k[..to * 5], &v[..to * 7], &s);
                    let mut out = vec![0.0; (to - from) * 14];
                    attention(&q[from * 10..to * 10], kv, &s, &mut out, &exec).unwrap();
                    out
                };
                let all = run(0, 230);
                for (from, to) in [(0, 1), (100, 101), (64, 96), (57, 230)] {
                    assert_eq!(run(from, to), all[from * 14..to * 14], "{batching:?} {from} {to}");
                }
            }
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
        let (k, mut out) = ([0.0; 4], [0.0; 12]);
        let exec = Exec::default();
        assert!(attention(&[0.0; 12], flat(&k, &k, &s), &s, &mut out, &exec).is_err());
        assert!(attention(&[0.0; 8], flat(&k, &k[..2], &s), &s, &mut out[..8], &exec).is_err());
        assert!(attention(&[0.0; 8], flat(&k, &k, &s), &s, &mut out[..7], &exec).is_err());
        let kv = flat(&k, &k, &s);
        assert!(attention_lanes(&[0.0; 8], &[kv, kv], &s, &mut out[..8], &exec).is_ok());
        assert!(attention_lanes(&[0.0; 8], &[kv], &s, &mut out[..8], &exec).is_err());
        let none = KeyValues { count: 0, ..kv };
        assert!(attention_lanes(&[0.0; 8], &[kv, none], &s, &mut out[..8], &exec).is_err());
        for kv_heads in [0, 3] {
            let s = AttentionSpec { kv_heads, ..s };
            assert!(
                attention(&[0.0; 4], KeyValues { count: 1, ..kv }, &s, &mut out[..4], &exec)
                    .is_err()
            );
        }
    }
}

//! Attention of many queries: blocks of them at a time.

use rayon::prelude::*;

use super::{AttentionSpec, KeyValues};
use crate::Dtype;
use crate::dot::dot_for;
use crate::norm::softmax;

/// Queries of one task: bounds the scratch to `QUERIES * keys` scores per thread.
const QUERIES: usize = 64;

/// From this many queries on, scores are matrix products.
const GEMM_FROM: usize = 4;

/// [`super::attention`] with all sizes checked.
///
/// * `q`: `[tokens, heads * qk_dim]`; `out`: `[tokens, heads * v_dim]`; `tokens > 0`
pub(super) fn prefill(
    q: &[f32],
    kv: KeyValues<'_>,
    spec: &AttentionSpec,
    tokens: usize,
    out: &mut [f32],
) {
    let AttentionSpec { heads, qk_dim, v_dim, .. } = *spec;
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

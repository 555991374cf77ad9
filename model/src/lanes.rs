//! Attention of many sequences that go forward together, one token each.

use candle_core::{Device, Tensor};
use moe_merge_kernels::{self as kernels, AttentionSpec};
use rayon::prelude::*;

use crate::cache::LayerCache;
use crate::error::ModelError;
use crate::ops::to_vec;

/// Puts the new key and value of each sequence into its cache, and attends to what that holds.
///
/// * `caches`, `lens`: per sequence its cache, and the tokens in it so far
/// * `[q, k, v]`: `[sequences, heads * dim]`; returns `[sequences, heads * v_dim]`
/// * each sequence by itself: neither the others nor the number of threads change a bit
pub(crate) fn attend(
    caches: &mut [LayerCache],
    lens: &[usize],
    [q, k, v]: [&Tensor; 3],
    spec: &AttentionSpec,
) -> Result<Tensor, ModelError> {
    let lanes = lens.len();
    if caches.len() != lanes || q.dim(0)? != lanes {
        return Err(candle_core::Error::msg("as many caches as sequences are needed").into());
    }
    let (q, k, v) = (to_vec(q)?, to_vec(k)?, to_vec(v)?);
    let (q_width, width) = (spec.heads * spec.qk_dim, spec.heads * spec.v_dim);
    let (k_width, v_width) = (spec.kv_heads * spec.qk_dim, spec.kv_heads * spec.v_dim);
    let mut out = vec![0.0; lanes * width];
    let rows = q
        .par_chunks_exact(q_width)
        .zip(k.par_chunks_exact(k_width))
        .zip(v.par_chunks_exact(v_width))
        .zip(out.par_chunks_exact_mut(width))
        .zip(caches.par_iter_mut().zip(lens));
    rows.try_for_each(|((((q, k), v), out), (cache, &len))| {
        cache.put(len, k, v);
        kernels::attention(q, cache.view(len + 1), spec, out).map_err(candle_core::Error::wrap)
    })?;
    Ok(Tensor::from_vec(out, (lanes, width), &Device::Cpu)?)
}

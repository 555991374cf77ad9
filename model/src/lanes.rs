//! Attention of many sequences that go forward together, one token each.

use candle_core::{Device, Tensor};
use moe_merge_kernels::{self as kernels, AttentionSpec, Exec};

use crate::cache::LayerCache;
use crate::error::ModelError;
use crate::ops::to_vec;

/// Puts the new key and value of each sequence into its cache, and attends to what that holds.
///
/// * `caches`, `lens`: per sequence its cache, and the tokens in it so far
/// * `[q, k, v]`: `[sequences, heads * dim]`; returns `[sequences, heads * v_dim]`
/// * each sequence by itself: neither the others nor the number of threads change a bit
pub(crate) fn attend(
    caches: &mut [&mut LayerCache],
    lens: &[usize],
    [q, k, v]: [&Tensor; 3],
    spec: &AttentionSpec,
    exec: &Exec,
) -> Result<Tensor, ModelError> {
    let lanes = lens.len();
    if caches.len() != lanes || q.dim(0)? != lanes {
        return Err(candle_core::Error::msg("as many caches as sequences are needed").into());
    }
    let (q, k, v) = (to_vec(q)?, to_vec(k)?, to_vec(v)?);
    let width = spec.heads * spec.v_dim;
    let (k_width, v_width) = (spec.kv_heads * spec.qk_dim, spec.kv_heads * spec.v_dim);
    let rows = k.chunks_exact(k_width).zip(v.chunks_exact(v_width));
    for (((k, v), cache), &len) in rows.zip(&mut *caches).zip(lens) {
        cache.put(len, k, v);
    }
    let mut out = vec![0.0; lanes * width];
    let (mut exact, mut half) = (Vec::new(), Vec::new());
    for (cache, len) in caches.iter().zip(lens) {
        match &**cache {
            LayerCache::F32(kept) => exact.push(kept.view(len + 1)),
            LayerCache::F16(kept) => half.push(kept.view(len + 1)),
        }
    }
    // All are of one model, and so of one kind.
    match half.is_empty() {
        true => kernels::attention_lanes(&q, &exact, spec, &mut out, exec),
        false => kernels::attention_lanes(&q, &half, spec, &mut out, exec),
    }
    .map_err(candle_core::Error::wrap)?;
    Ok(Tensor::from_vec(out, (lanes, width), &Device::Cpu)?)
}

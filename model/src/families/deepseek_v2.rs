//! DeepSeek 2: attention through latents, group-limited routing, shared experts.

use super::deepseek::{experts, sparse_layers};
use super::keys::Keys;
use crate::error::ModelError;
use crate::spec::{AttentionKind, Mlp, Spec};
use moe_merge_kernels::{Precision, RopePairing};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = keys.llama("deepseek_v2", 10_000.0)?;
    let (nope_dim, rope_dim) = (keys.size("qk_nope_head_dim")?, keys.size("qk_rope_head_dim")?);
    let q_rank = Some(keys.size_or("q_lora_rank", 0)?).filter(|rank| *rank > 0);
    let attention = &mut spec.attention;
    attention.kind = AttentionKind::Latent {
        q_rank,
        kv_rank: keys.size("kv_lora_rank")?,
        nope_dim,
        rope_dim,
        v_dim: keys.size("v_head_dim")?,
        bias: keys.bool_or("attention_bias", false)?,
    };
    // Latents are expanded for every query head.
    attention.kv_heads = attention.heads;
    attention.scale = (keys.yarn_score_scale() / ((nope_dim + rope_dim) as f64).sqrt()) as f32;
    let mut rope = keys.rope(10_000.0, rope_dim)?;
    rope.pairing = RopePairing::Interleaved;
    let mlp_bias = keys.bool_or("mlp_bias", false)?;
    for layer in &mut spec.layers {
        layer.rope = rope;
        if let Mlp::Dense(mlp) = &mut layer.mlp {
            mlp.bias = mlp_bias;
        }
    }
    let mut moe = experts(keys)?;
    moe.reference_precision = Precision::F32;
    moe.router.scale = keys.number_or("routed_scaling_factor", 1.0)? as f32;
    moe.router.groups = match keys.text("topk_method") {
        None | Some("greedy") => None,
        Some("group_limited_greedy") => Some((keys.size("n_group")?, keys.size("topk_group")?)),
        Some(_) => return Err(keys.refuse("topk_method", "greedy or group_limited_greedy")),
    };
    if let Some(shared) = &mut moe.shared {
        shared.bias = mlp_bias;
    }
    sparse_layers(keys, &mut spec, &moe)?;
    Ok(spec)
}

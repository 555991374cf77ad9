//! A layer's weights, by the names of its family.

use std::sync::Arc;

use moe_merge_checkpoint::weight::RowSlice;

use super::{Feed, Moe, Projections, Queries};
use crate::error::ModelError;
use crate::ops::{Expert, FrozenLinear, RmsNorm};
use crate::spec::{AttentionKind, ExpertNames, MoeMlp, QkNorm, SharedExpert, Spec};
use crate::weights::Weights;

/// The norm `name` of the spec's kind.
pub(crate) fn norm(weights: &Weights, spec: &Spec, name: &str) -> Result<RmsNorm, ModelError> {
    Ok(RmsNorm { weight: weights.vector(name)?, eps: spec.eps, offset: spec.norm_offset })
}

pub(super) fn load_attention(
    weights: &Weights,
    spec: &Spec,
    at: &str,
) -> Result<Projections, ModelError> {
    let a = &spec.attention;
    let linear = |name: &str| weights.linear(&format!("{at}.{name}"));
    match a.kind {
        AttentionKind::Projected { head_dim, qk_norm, fused, .. } => {
            let (q_rows, kv_rows) = (a.heads * head_dim, a.kv_heads * head_dim);
            let [q, k, v] = if fused {
                weights.cut(&format!("{at}.qkv_proj"), [q_rows, kv_rows, kv_rows])?
            } else {
                [linear("q_proj")?, linear("k_proj")?, linear("v_proj")?]
            };
            let norms = match qk_norm {
                QkNorm::Absent => None,
                _ => Some([
                    norm(weights, spec, &format!("{at}.q_norm.weight"))?,
                    norm(weights, spec, &format!("{at}.k_norm.weight"))?,
                ]),
            };
            Ok(Projections::Plain { q, k, v, o: linear("o_proj")?, norms })
        }
        AttentionKind::Latent { q_rank, .. } => {
            // The reference gives these two norms its default, not the configuration's eps.
            let norm = |name: &str| -> Result<RmsNorm, ModelError> {
                let weight = weights.vector(&format!("{at}.{name}.weight"))?;
                Ok(RmsNorm { weight, eps: 1e-6, offset: 0.0 })
            };
            let q = match q_rank {
                None => Queries::Whole(linear("q_proj")?),
                Some(_) => Queries::Latent {
                    a: linear("q_a_proj")?,
                    norm: norm("q_a_layernorm")?,
                    b: linear("q_b_proj")?,
                },
            };
            Ok(Projections::Latent {
                q,
                kv_a: linear("kv_a_proj_with_mqa")?,
                kv_norm: norm("kv_a_layernorm")?,
                kv_b: linear("kv_b_proj")?,
                o: linear("o_proj")?,
            })
        }
    }
}

pub(super) fn gated(
    weights: &Weights,
    at: &str,
    fused: bool,
    inter: usize,
) -> Result<Expert, ModelError> {
    let linear = |name: &str| weights.linear(&format!("{at}.{name}"));
    let [gate, up] = if fused {
        weights.cut(&format!("{at}.gate_up_proj"), [inter, inter])?
    } else {
        [linear("gate_proj")?, linear("up_proj")?]
    };
    Ok(Expert { gate, up, down: linear("down_proj")? })
}

/// `at` is the layer's prefix, dot included.
pub(super) fn load_moe(
    weights: &Weights,
    moe: &MoeMlp,
    at: &str,
    hidden: usize,
) -> Result<Feed, ModelError> {
    let plain = |name: &str| -> Result<FrozenLinear, ModelError> {
        Ok(weights.frozen(weights.get(&format!("{at}{name}"))?, None))
    };
    let experts: Vec<Expert> = if moe.names == ExpertNames::Granite {
        stacked_experts(weights, moe, at, hidden)?
    } else {
        (0..moe.experts)
            .filter_map(|e| moe.names.expert(e))
            .map(|[gate, up, down]| {
                Ok(Expert { gate: plain(&gate)?, up: plain(&up)?, down: plain(&down)? })
            })
            .collect::<Result<_, ModelError>>()?
    };
    let bias = moe.selection_bias.map(|name| weights.vector(&format!("{at}{name}"))).transpose()?;
    let shared = moe.shared.as_ref().map(|s| load_shared(weights, s, at)).transpose()?;
    // Which experts a token visits must not hang on how its activations are rounded.
    let router = plain(moe.names.router())?.exact();
    let experts = experts.into();
    let (spec, placed) = (moe.clone(), None);
    Ok(Feed::Moe(Box::new(Moe { spec, router, bias, experts, shared, placed })))
}

/// Experts that are slices of two stacked tensors.
fn stacked_experts(
    weights: &Weights,
    moe: &MoeMlp,
    at: &str,
    hidden: usize,
) -> Result<Vec<Expert>, ModelError> {
    let input = weights.get(&format!("{at}block_sparse_moe.input_linear.weight"))?;
    let output = weights.get(&format!("{at}block_sparse_moe.output_linear.weight"))?;
    let slice = |from: &moe_merge_checkpoint::WeightRef, part: usize, rows: usize| {
        let rows = part * rows..(part + 1) * rows;
        weights.frozen(Arc::new(RowSlice::new(from.clone(), rows)), None)
    };
    Ok((0..moe.experts)
        .map(|e| Expert {
            gate: slice(&input, 2 * e, moe.inter),
            up: slice(&input, 2 * e + 1, moe.inter),
            down: slice(&output, e, hidden),
        })
        .collect())
}

fn load_shared(
    weights: &Weights,
    shared: &SharedExpert,
    at: &str,
) -> Result<(Expert, Option<FrozenLinear>), ModelError> {
    let module = format!("{at}{}", shared.module);
    let mlp = if shared.fused {
        let [gate, up] =
            weights.cut(&format!("{module}.input_linear"), [shared.inter, shared.inter])?;
        Expert { gate, up, down: weights.linear(&format!("{module}.output_linear"))? }
    } else {
        gated(weights, &module, false, shared.inter)?
    };
    let gate = shared.gate.map(|g| weights.linear(&format!("{at}{g}"))).transpose()?;
    Ok((mlp, gate))
}

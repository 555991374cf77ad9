//! ERNIE 4.5 MoE: llama attention with interleaved rotary pairs, any number of ungated shared experts, no remote code.

use std::sync::Arc;

use moe_merge_checkpoint::weight::PermutedRows;
use moe_merge_checkpoint::{Dtype, Source, WeightRef};
use serde_json::{Map, Value, json};

use super::{Addition, Dims, Matrix, OutputFamily, Request, Shape, expect_llama_ungated, set};
use crate::error::MergeError;

/// `Ernie4_5_MoeForCausalLM`.
#[derive(Debug)]
pub struct Ernie;

impl OutputFamily for Ernie {
    fn name(&self) -> &'static str {
        "ernie4_5_moe"
    }

    fn class(&self) -> &'static str {
        "Ernie4_5_MoeForCausalLM"
    }

    fn summary(&self) -> &'static str {
        "llama or mistral, any number of ungated shared experts; no remote code"
    }

    fn accepts(&self, request: &Request<'_>) -> Result<(), MergeError> {
        expect_llama_ungated(self, request)
    }

    /// The family's loaders keep the router in f32.
    fn router_dtype(&self) -> Option<Dtype> {
        Some(Dtype::F32)
    }

    fn shared(&self, layer: usize, matrix: Matrix) -> Option<String> {
        Some(format!("model.layers.{layer}.mlp.shared_experts.{}.weight", matrix.name()))
    }

    /// Rotation pairs dimensions `(2i, 2i + 1)` here, `(i, i + head_dim / 2)` in llama: rows of q and k are put in that order.
    fn attention(&self, name: &str, weight: WeightRef, dims: &Dims) -> WeightRef {
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => dims.heads,
            Some("k_proj") => dims.kv_heads,
            _ => return weight,
        };
        Arc::new(PermutedRows::new(weight, Arc::new(interleaved(heads, dims.head_dim))))
    }

    fn additions(
        &self,
        layer: usize,
        shape: &Shape,
        _base: &Source,
        _dtype: Dtype,
    ) -> Vec<Addition> {
        let name = format!("model.layers.{layer}.mlp.moe_statics.e_score_correction_bias");
        vec![Addition::zeros(name, &[1, shape.experts], Dtype::F32)]
    }

    fn configure(&self, config: &mut Map<String, Value>, shape: &Shape) {
        let dims = &shape.dims;
        config.remove("attention_bias");
        set(
            config,
            [
                ("moe_num_experts", json!(shape.experts)),
                ("moe_k", json!(shape.top_k)),
                ("moe_num_shared_experts", json!(shape.shared)),
                ("moe_intermediate_size", json!(dims.intermediate)),
                ("moe_layer_start_index", json!(0)),
                ("moe_layer_end_index", json!(dims.layers - 1)),
                ("moe_layer_interval", json!(1)),
                ("moe_norm_min", json!(1e-12)),
                ("moe_use_aux_free", json!(true)),
                ("use_bias", json!(false)),
                ("head_dim", json!(dims.head_dim)),
                // No layer is dense, so nobody uses this width but llama.cpp's converter, which takes the width of the
                // shared experts to be intermediate_size / num_key_value_heads.
                (
                    "intermediate_size",
                    json!(dims.intermediate * shape.shared.max(1) * dims.kv_heads),
                ),
            ],
        );
    }
}

/// `order[i]` is the row of the halves order that becomes row `i` of the interleaved order.
fn interleaved(heads: usize, head_dim: usize) -> Vec<u32> {
    let half = head_dim / 2;
    (0..heads * head_dim)
        .map(|row| {
            let (head, i) = (row / head_dim, row % head_dim);
            (head * head_dim + i / 2 + (i % 2) * half) as u32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::interleaved;

    #[test]
    fn halves_become_neighbours() {
        assert_eq!(interleaved(2, 4), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(interleaved(1, 6), [0, 3, 1, 4, 2, 5]);
    }
}

//! Qwen3-MoE: attention with norms on queries and keys, no shared experts.

use serde_json::{Map, Value, json};

use super::{
    Matrix, OutputFamily, Request, Shape, expect_no_bias, expect_shared, expect_type, set,
};
use crate::error::MergeError;

/// `Qwen3MoeForCausalLM`.
#[derive(Debug)]
pub struct Qwen3Moe;

impl OutputFamily for Qwen3Moe {
    fn name(&self) -> &'static str {
        "qwen3_moe"
    }

    fn class(&self) -> &'static str {
        "Qwen3MoeForCausalLM"
    }

    fn summary(&self) -> &'static str {
        "qwen3, no shared experts"
    }

    fn accepts(&self, request: &Request<'_>) -> Result<(), MergeError> {
        expect_type(self, request, &["qwen3"])?;
        expect_shared(
            self,
            request,
            0..=0,
            "leave `shared_experts` out: no family with qwen3's attention has them",
        )?;
        let hint = "use a base without attention biases";
        expect_no_bias(
            self,
            request,
            &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
            hint,
        )
    }

    fn shared(&self, _layer: usize, _matrix: Matrix) -> Option<String> {
        None
    }

    fn configure(&self, config: &mut Map<String, Value>, shape: &Shape) {
        set(
            config,
            [
                // transformers 4.57 reads the first, what 5.x saves is the second.
                ("num_experts", json!(shape.experts)),
                ("num_local_experts", json!(shape.experts)),
                ("num_experts_per_tok", json!(shape.top_k)),
                ("moe_intermediate_size", json!(shape.dims.intermediate)),
                ("decoder_sparse_step", json!(1)),
                ("mlp_only_layers", json!([])),
                ("norm_topk_prob", json!(true)),
                ("attention_bias", json!(false)),
                ("head_dim", json!(shape.dims.head_dim)),
                ("sliding_window", Value::Null),
                ("use_sliding_window", json!(false)),
                ("max_window_layers", json!(shape.dims.layers)),
            ],
        );
    }
}

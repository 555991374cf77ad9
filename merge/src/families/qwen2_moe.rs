//! Qwen2-MoE: biases on queries, keys and values; exactly one shared expert behind a sigmoid gate.

use moe_merge_checkpoint::{Dtype, Source};
use serde_json::{Map, Value, json};

use super::{
    Addition, Matrix, OutputFamily, Request, Shape, SharedGate, expect_no_bias, expect_plain_heads,
    expect_shared, expect_type, refuse, set,
};
use crate::error::MergeError;

/// `Qwen2MoeForCausalLM`.
#[derive(Debug)]
pub struct Qwen2Moe;

impl OutputFamily for Qwen2Moe {
    fn name(&self) -> &'static str {
        "qwen2_moe"
    }

    fn class(&self) -> &'static str {
        "Qwen2MoeForCausalLM"
    }

    fn summary(&self) -> &'static str {
        "llama, mistral or qwen2, exactly one gated shared expert"
    }

    fn accepts(&self, request: &Request<'_>) -> Result<(), MergeError> {
        expect_type(self, request, &["llama", "mistral", "qwen2"])?;
        expect_shared(
            self,
            request,
            1..=1,
            "give one source under `shared_experts`, with prompts; `architecture: mixtral` needs none",
        )?;
        if request.shared_gate == SharedGate::Absent {
            return Err(refuse(
                self,
                request.base,
                "the shared expert of `qwen2_moe` is behind a gate, and this one has no prompts"
                    .into(),
                "`positive_prompts` for the shared expert, or a random gate mode",
                "none".into(),
                "give it prompts, or write `architecture: ernie4_5_moe`, which has no such gate",
            ));
        }
        expect_plain_heads(self, request)?;
        expect_no_bias(
            self,
            request,
            &["self_attn.o_proj"],
            "no output family has this bias; use another base",
        )
    }

    fn shared(&self, layer: usize, matrix: Matrix) -> Option<String> {
        Some(format!("model.layers.{layer}.mlp.shared_expert.{}.weight", matrix.name()))
    }

    fn shared_gate(&self, layer: usize) -> Option<String> {
        Some(format!("model.layers.{layer}.mlp.shared_expert_gate.weight"))
    }

    fn additions(&self, layer: usize, shape: &Shape, base: &Source, dtype: Dtype) -> Vec<Addition> {
        let dims = &shape.dims;
        [("q", dims.heads), ("k", dims.kv_heads), ("v", dims.kv_heads)]
            .into_iter()
            .map(|(p, heads)| (format!("model.layers.{layer}.self_attn.{p}_proj.bias"), heads))
            .filter(|(name, _)| !base.tensors.contains_key(name))
            .map(|(name, heads)| Addition::zeros(name, &[heads * dims.head_dim], dtype))
            .collect()
    }

    fn configure(&self, config: &mut Map<String, Value>, shape: &Shape) {
        config.remove("attention_bias");
        set(
            config,
            [
                ("num_experts", json!(shape.experts)),
                ("num_experts_per_tok", json!(shape.top_k)),
                ("moe_intermediate_size", json!(shape.dims.intermediate)),
                ("shared_expert_intermediate_size", json!(shape.dims.intermediate)),
                ("decoder_sparse_step", json!(1)),
                ("mlp_only_layers", json!([])),
                ("norm_topk_prob", json!(true)),
                ("qkv_bias", json!(true)),
                ("sliding_window", Value::Null),
                ("use_sliding_window", json!(false)),
                ("max_window_layers", json!(shape.dims.layers)),
            ],
        );
    }
}

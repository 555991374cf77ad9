//! Granite MoE: llama attention with four multipliers set to do nothing, any number of ungated shared experts side by
//! side, all experts of a layer in one tensor.
//!
//! `architecture: auto` prefers `ernie4_5_moe` for the same request: there every expert lies in tensors and in a file of
//! its own and can be replaced alone. What speaks for this family is llama.cpp: its converter reads ERNIE 4.5 only with a
//! SentencePiece `tokenizer.model`, and Granite with the tokenizer of any llama.

use serde_json::{Map, Value, json};

use super::{
    Layout, Matrix, OutputFamily, Request, Shape, expect_llama_ungated, expect_plain_heads, set,
};
use crate::error::MergeError;

/// `GraniteMoeSharedForCausalLM`.
#[derive(Debug)]
pub struct Granite;

impl OutputFamily for Granite {
    fn name(&self) -> &'static str {
        "granitemoeshared"
    }

    fn class(&self) -> &'static str {
        "GraniteMoeSharedForCausalLM"
    }

    fn summary(&self) -> &'static str {
        "llama or mistral, any number of ungated shared experts; stacked experts, reaches llama.cpp"
    }

    fn accepts(&self, request: &Request<'_>) -> Result<(), MergeError> {
        expect_llama_ungated(self, request)?;
        expect_plain_heads(self, request)
    }

    /// There is one layout, and it is stacked already.
    fn has_fused(&self) -> bool {
        false
    }

    fn router(&self, layer: usize, _layout: Layout) -> String {
        format!("model.layers.{layer}.block_sparse_moe.router.layer.weight")
    }

    fn stacked(&self, layer: usize, _layout: Layout) -> Option<[String; 2]> {
        Some(
            ["input_linear", "output_linear"]
                .map(|n| format!("model.layers.{layer}.block_sparse_moe.{n}.weight")),
        )
    }

    fn shared(&self, _layer: usize, _matrix: Matrix) -> Option<String> {
        None
    }

    fn stacked_shared(&self, layer: usize) -> Option<[String; 2]> {
        Some(
            ["input_linear", "output_linear"]
                .map(|n| format!("model.layers.{layer}.shared_mlp.{n}.weight")),
        )
    }

    fn configure(&self, config: &mut Map<String, Value>, shape: &Shape) {
        let dims = &shape.dims;
        set(
            config,
            [
                ("num_local_experts", json!(shape.experts)),
                ("num_experts_per_tok", json!(shape.top_k)),
                ("shared_intermediate_size", json!(shape.shared * dims.intermediate)),
                ("attention_bias", json!(false)),
                ("attention_multiplier", json!((dims.head_dim as f64).sqrt().recip())),
                ("embedding_multiplier", json!(1.0)),
                ("residual_multiplier", json!(1.0)),
                ("logits_scaling", json!(1.0)),
            ],
        );
    }
}

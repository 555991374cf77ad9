//! Mixtral: llama or mistral attention without biases, no shared experts.

use serde_json::{Map, Value, json};

use super::{
    Layout, Matrix, OutputFamily, Request, Shape, expect_no_bias, expect_shared, expect_type, set,
};
use crate::error::MergeError;

/// `MixtralForCausalLM`.
#[derive(Debug)]
pub struct Mixtral;

impl OutputFamily for Mixtral {
    fn name(&self) -> &'static str {
        "mixtral"
    }

    fn class(&self) -> &'static str {
        "MixtralForCausalLM"
    }

    fn summary(&self) -> &'static str {
        "llama or mistral, no shared experts; loads everywhere"
    }

    fn accepts(&self, request: &Request<'_>) -> Result<(), MergeError> {
        expect_type(self, request, &["llama", "mistral"])?;
        expect_shared(
            self,
            request,
            0..=0,
            "write `architecture: ernie4_5_moe`, or `qwen2_moe` for one shared expert with prompts",
        )?;
        let hint = "write `architecture: qwen2_moe` (with one shared expert), which keeps biases on q, k and v";
        expect_no_bias(
            self,
            request,
            &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            hint,
        )?;
        expect_no_bias(
            self,
            request,
            &["self_attn.o_proj"],
            "no output family has this bias; use another base",
        )
    }

    fn router(&self, layer: usize, layout: Layout) -> String {
        match layout {
            Layout::Hub => format!("model.layers.{layer}.block_sparse_moe.gate.weight"),
            Layout::Fused => format!("model.layers.{layer}.mlp.gate.weight"),
        }
    }

    fn expert(&self, layer: usize, expert: usize, matrix: Matrix) -> String {
        let name = match matrix {
            Matrix::Gate => "w1",
            Matrix::Up => "w3",
            Matrix::Down => "w2",
        };
        format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight")
    }

    fn shared(&self, _layer: usize, _matrix: Matrix) -> Option<String> {
        None
    }

    fn configure(&self, config: &mut Map<String, Value>, shape: &Shape) {
        set(
            config,
            [
                ("num_local_experts", json!(shape.experts)),
                ("num_experts_per_tok", json!(shape.top_k)),
                ("head_dim", json!(shape.dims.head_dim)),
                ("sliding_window", Value::Null),
                ("router_jitter_noise", json!(0.0)),
            ],
        );
    }
}

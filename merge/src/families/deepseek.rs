//! DeepSeek-MoE, the first version, as mergekit writes it: loaders need the remote code of its first model.

use serde_json::{Map, Value, json};

use super::{Matrix, OutputFamily, Request, Shape, expect_llama_ungated, expect_plain_heads, set};
use crate::error::MergeError;

/// `DeepseekForCausalLM`.
#[derive(Debug)]
pub struct Deepseek;

impl OutputFamily for Deepseek {
    fn name(&self) -> &'static str {
        "deepseek"
    }

    fn class(&self) -> &'static str {
        "DeepseekForCausalLM"
    }

    fn summary(&self) -> &'static str {
        "llama or mistral, any number of ungated shared experts; needs remote code"
    }

    fn accepts(&self, request: &Request<'_>) -> Result<(), MergeError> {
        expect_llama_ungated(self, request)?;
        expect_plain_heads(self, request)
    }

    fn has_fused(&self) -> bool {
        false
    }

    fn shared(&self, layer: usize, matrix: Matrix) -> Option<String> {
        Some(format!("model.layers.{layer}.mlp.shared_experts.{}.weight", matrix.name()))
    }

    fn configure(&self, config: &mut Map<String, Value>, shape: &Shape) {
        let code = "deepseek-ai/deepseek-moe-16b-base--";
        set(
            config,
            [
                ("n_routed_experts", json!(shape.experts)),
                ("n_shared_experts", json!((shape.shared > 0).then_some(shape.shared))),
                ("num_experts_per_tok", json!(shape.top_k)),
                ("moe_intermediate_size", json!(shape.dims.intermediate)),
                ("first_k_dense_replace", json!(0)),
                ("moe_layer_freq", json!(1)),
                ("scoring_func", json!("softmax")),
                ("norm_topk_prob", json!(true)),
                ("attention_bias", json!(false)),
                (
                    "auto_map",
                    json!({
                        "AutoConfig": format!("{code}configuration_deepseek.DeepseekConfig"),
                        "AutoModel": format!("{code}modeling_deepseek.DeepseekModel"),
                        "AutoModelForCausalLM": format!("{code}modeling_deepseek.DeepseekForCausalLM"),
                    }),
                ),
            ],
        );
    }
}

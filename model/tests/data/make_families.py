"""Small random checkpoints of families that the shared reference data lacks, and what transformers computes from them.

Usage: python make_families.py OUT_DIR   (torch 2.9.1, transformers 5.23.0, CPU, float32, seed 7)

`ernie4_5_moe`, `granitemoeshared`: transformers' own models. `deepseek_v2_yarn`: group-limited routing, query latent,
YaRN. `mixtral_fused`: the layout that transformers 5 has in memory. Each folder holds the checkpoint as transformers writes it and `expected.safetensors` with `input_ids`, `logits`
and `hidden_0 ... hidden_L`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

COMMON = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)
MODELS = {
    "mixtral_fused": lambda: MixtralForCausalLM(MixtralConfig(
        **COMMON, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)),
    "ernie4_5_moe": lambda: Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(
        **COMMON, num_key_value_heads=2, moe_intermediate_size=8, moe_k=2, moe_num_experts=4, moe_num_shared_experts=1,
        moe_layer_start_index=1)),
    "granitemoeshared": lambda: GraniteMoeSharedForCausalLM(GraniteMoeSharedConfig(
        **COMMON, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=12,
        embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0)),
    "deepseek_v2_yarn": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(
        **COMMON, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=4, qk_rope_head_dim=8,
        head_dim=8, v_head_dim=6, moe_intermediate_size=8, n_routed_experts=8, n_shared_experts=2,
        num_experts_per_tok=3, topk_method="group_limited_greedy", n_group=4, topk_group=2,
        routed_scaling_factor=1.5, first_k_dense_replace=1,
        rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=32, beta_slow=1,
                             mscale=0.707, mscale_all_dim=0.8, original_max_position_embeddings=32))),
}


def main(out: Path) -> None:
    for name, make in MODELS.items():
        torch.manual_seed(7)
        model = make().eval()
        with torch.no_grad():
            for key, value in list(model.named_parameters()) + list(model.named_buffers()):
                if value.dtype == torch.float32 and "inv_freq" not in key:
                    noise = torch.randn_like(value)
                    value.copy_(1 + 0.2 * noise if "norm" in key else 0.3 * noise)
            ids = torch.randint(3, 32, (1, 12))
            model.set_attn_implementation("eager")
            result = model(ids, output_hidden_states=True, use_cache=False)
        folder = out / name
        model.save_pretrained(folder, save_original_format=not name.endswith("_fused"))
        (folder / "generation_config.json").unlink(missing_ok=True)
        expected = {"input_ids": ids, "logits": result.logits}
        expected |= {f"hidden_{i}": h for i, h in enumerate(result.hidden_states)}
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


main(Path(sys.argv[1]))

"""Tiny models, one PEFT adapter of every kind on them, and the weights PEFT itself merges.

    python make_adapters.py        writes adapters/ beside this file; torch 2.9.1, transformers 5.23.0, peft 0.21.2

adapters/<model>/            config.json, model.safetensors: the base, as transformers saves it
adapters/<case>/             adapter_config.json, adapter_model.safetensors: as PEFT saves them
adapters/<case>/merged.safetensors   tensors of `merge_and_unload` that differ from the base, f32, hub names
adapters/cases.json          case -> base, and the names of the tensors that differ
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

warnings.filterwarnings("ignore")
OUT = Path(__file__).parent / "adapters"
HIDDEN, INNER, VOCAB, LAYERS, EXPERTS = 16, 24, 48, 2, 3


def llama(**kw):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, **kw))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=2,
        max_position_embeddings=64))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=16))


BASES = {
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "llama_bias": lambda: llama(tie_word_embeddings=False, attention_bias=True),
    "mixtral": mixtral,
    "gpt2": gpt2,
}

CASES = {
    "linear": ("llama", dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "gate_proj", "down_proj"])),
    "linear_bf16": ("llama", dict(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"])),
    "rslora": ("llama", dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj", "up_proj"])),
    "patterns": ("llama", dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"],
        rank_pattern={r"layers\.1\..*": 2, "o_proj": 3}, alpha_pattern={"down_proj": 20, "q_proj": 3})),
    "fan_in_fan_out": ("gpt2", dict(
        r=2, lora_alpha=4, fan_in_fan_out=True, target_modules=["c_attn", "attn.c_proj", "c_fc"])),
    "fan_in_fan_out_dora": ("gpt2", dict(
        r=2, lora_alpha=4, fan_in_fan_out=True, use_dora=True, target_modules=["c_attn", "attn.c_proj"])),
    "embedding": ("llama", dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head"])),
    "embedding_tied": ("llama_tied", dict(r=3, lora_alpha=6, target_modules=["embed_tokens"])),
    "head_tied": ("llama_tied", dict(r=3, lora_alpha=6, target_modules=["lm_head"])),
    "dora": ("llama", dict(r=3, lora_alpha=6, use_dora=True, target_modules=["k_proj", "down_proj"])),
    "dora_embedding": ("llama", dict(r=3, lora_alpha=6, use_dora=True, target_modules=["embed_tokens"])),
    "modules_to_save": ("llama", dict(
        r=2, lora_alpha=4, target_modules=["v_proj"], modules_to_save=["lm_head", "input_layernorm"])),
    "lora_bias": ("llama_bias", dict(r=2, lora_alpha=6, lora_bias=True, target_modules=["q_proj", "o_proj"])),
    "bias_all": ("llama_bias", dict(r=2, lora_alpha=4, bias="all", target_modules=["q_proj"])),
    "bias_lora_only": ("llama_bias", dict(r=2, lora_alpha=4, bias="lora_only", target_modules=["v_proj"])),
    "trainable_tokens": ("llama", dict(
        r=2, lora_alpha=4, target_modules=["v_proj"],
        trainable_token_indices={"embed_tokens": [5, 47, 0], "lm_head": [7]})),
    "trainable_tokens_tied": ("llama_tied", dict(
        r=2, lora_alpha=4, target_modules=["v_proj"], trainable_token_indices=[3, 4])),
    "packed_experts": ("mixtral", dict(
        r=2, lora_alpha=6, target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "packed_down_only": ("mixtral", dict(
        r=2, lora_alpha=6, use_rslora=True, target_modules=[], target_parameters=["mlp.experts.down_proj"],
        rank_pattern={"experts.down_proj": 3})),
    "packed_router": ("mixtral", dict(
        r=2, lora_alpha=6, target_modules=[], target_parameters=["mlp.gate.weight", "mlp.experts.gate_up_proj"])),
}


def randomise(model, std):
    """Normal numbers everywhere, so that nothing hides behind an initial zero or one."""
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) * std + (1.0 if p.ndim == 1 else 0.0))


def make_base(name):
    torch.manual_seed(1)
    model = BASES[name]()
    model.requires_grad_(True)
    randomise(model, 0.3)
    return model


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    cases = {}
    for name in BASES:
        make_base(name).save_pretrained(OUT / name)
        (OUT / name / "generation_config.json").unlink(missing_ok=True)
    for case, (base, kw) in CASES.items():
        model = make_base(base)
        torch.manual_seed(2)
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **kw))
        randomise(peft, 0.2)
        if case.endswith("bf16"):
            for p in peft.parameters():
                if p.requires_grad:
                    p.data = p.data.bfloat16().float()
        peft.save_pretrained(OUT / case)
        (OUT / case / "README.md").unlink(missing_ok=True)
        weights = OUT / case / "adapter_model.safetensors"
        if case.endswith("bf16"):
            save_file({k: v.bfloat16() for k, v in load_file(weights).items()}, weights)
        merged = peft.merge_and_unload()
        merged.save_pretrained(OUT / "merged")
        old = load_file(OUT / base / "model.safetensors")
        new = load_file(OUT / "merged" / "model.safetensors")
        shutil.rmtree(OUT / "merged")
        changed = {k: v for k, v in new.items() if k not in old or not torch.equal(v, old[k])}
        save_file(changed, OUT / case / "merged.safetensors")
        cases[case] = {"base": base, "changed": sorted(changed)}
    (OUT / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


main()

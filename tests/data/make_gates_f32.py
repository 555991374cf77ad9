"""Gates of the `hidden` recipes for Qwen bases in f32 arithmetic.

usage: make_gates_f32.py GOLDEN_MOE_FOLDER OUT.safetensors

mergekit runs the base in bf16, and on these random Qwen models that alone moves its gates to a cosine of 0.9998 from the
same formula in f32 (printed). This is the same formula in f32: last position of each layer's input, mean over prompts,
norm 1.
"""

import os
import sys

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file


def gates(recipe_file: str, family: str) -> list[torch.Tensor]:
    recipe = yaml.safe_load(open(recipe_file))
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{family}/base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{family}/base", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = []
    for expert in recipe["experts"]:
        last = []
        for prompt in expert["positive_prompts"]:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states
            last.append(torch.stack([state[0, -1] for state in states[:-1]]))
        mean = torch.stack(last).mean(0)
        rows.append(mean / mean.norm(dim=-1, keepdim=True))
    return list(torch.stack(rows, 1))


def main() -> None:
    out = os.path.abspath(sys.argv[2])
    os.chdir(sys.argv[1])
    result = {}
    for case, family in (("qwen2_moe_hidden", "qwen2"), ("qwen3_moe_hidden", "qwen3")):
        expected = load_file(f"{case}.expected.safetensors")
        for layer, gate in enumerate(gates(f"{case}.yaml", family)):
            cosine = torch.nn.functional.cosine_similarity(gate, expected[f"gate_{layer}"], dim=-1)
            print(case, layer, "cosine of mergekit's gates to f32:", [round(c, 6) for c in cosine.tolist()])
            result[f"{case}.gate_{layer}"] = gate.contiguous()
    save_file(result, out)


if __name__ == "__main__":
    main()

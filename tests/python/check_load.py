"""Load a folder that moe-merge wrote with transformers and compare logits.

usage: check_load.py FOLDER LOGITS.safetensors TOKENS

LOGITS.safetensors is what `moe-merge logits FOLDER --tokens TOKENS --out LOGITS.safetensors` wrote. Prints one line of
JSON: missing and unexpected keys, the largest difference relative to the largest logit, the transformers version.
Works with transformers 4 and 5; exits with 1 when keys are missing or unexpected.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import load_file


def main() -> int:
    folder, expected, tokens = sys.argv[1], load_file(sys.argv[2])["logits"], sys.argv[3]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    ids = torch.tensor([[int(t) for t in tokens.split(",")]])
    with torch.no_grad():
        logits = model.eval()(ids).logits[0].float()
    difference = ((logits - expected).abs().max() / logits.abs().max()).item()
    report = {
        "transformers": transformers.__version__,
        "model": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(k) for k in info["mismatched_keys"]),
        "relative_difference": difference,
    }
    print(json.dumps(report))
    return 1 if report["missing"] or report["unexpected"] or report["mismatched"] else 0


if __name__ == "__main__":
    sys.exit(main())

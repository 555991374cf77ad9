"""Gradients of the next-token loss with respect to the router weights, as torch's autograd gives them.

Usage: python make_gradients.py OUT_DIR CHECKPOINT...   (torch 2.9.1, transformers 5.23.0, CPU, float32, eager attention)

Each CHECKPOINT is a folder as `make_families.py` or the shared reference data has them: a checkpoint, and
`expected.safetensors` with `input_ids`. For each, `OUT_DIR/NAME.safetensors` holds `input_ids` (the first row), `loss` (mean
cross entropy of all tokens but the first) and `layer_L` `[experts, hidden]` for every layer with a router.
"""

import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROUTER = re.compile(r"model\.layers\.(\d+)\.\w+\.(?:gate|router(?:\.layer)?)\.weight")


def main(out: Path, folders: list[Path]) -> None:
    out.mkdir(exist_ok=True)
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        ids = load_file(folder / "expected.safetensors")["input_ids"][:1]
        routers = {int(m[1]): p for n, p in model.named_parameters() if (m := ROUTER.fullmatch(n))}
        assert routers, [n for n, _ in model.named_parameters()]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(parameter is r for r in routers.values()))
        logits = model(ids, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:])
        loss.backward()
        result = {"input_ids": ids, "loss": loss.detach().reshape(1)}
        result |= {f"layer_{l}": p.grad for l, p in routers.items()}
        for l, p in sorted(routers.items()):
            print(folder.name, l, tuple(p.shape), float(loss), float(p.grad.norm()))
        save_file({k: v.contiguous() for k, v in result.items()}, out / f"{folder.name}.safetensors")


main(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]])

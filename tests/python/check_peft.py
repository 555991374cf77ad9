"""Load adapters that moe-merge extracted with PEFT, as anybody would, and compare logits.

usage: check_peft.py CASES.json

CASES.json is a list of
    base      model folder
    adapter   what `moe-merge extract-lora` wrote for it
    tokens    token ids
    logits    what our own reader computes from `base+adapter` for them, all positions

The adapter is loaded on top, and merged into the weights; both have to give the same logits, and others than the base
alone. Prints one line for each case and exits with 1 if any has a complaint.
"""

import json
import pathlib
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

BOUND = 2e-4  # share of the largest logit, as in DESIGN


def check(case):
    tokens = torch.tensor([case["tokens"]])
    expected = torch.tensor(case["logits"]).reshape(len(case["tokens"]), -1)
    scale = expected.abs().max().item()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(case["base"], dtype=torch.float32)
        alone = model(tokens).logits[0]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, case["adapter"])
        on_top = model(tokens).logits[0]
        merged = model.merge_and_unload()(tokens).logits[0]
    complaints = [str(w.message)[:200] for w in told if "missing" in str(w.message).lower()]
    for name, found in [("on top", on_top), ("merged", merged)]:
        difference = (found - expected).abs().max().item() / scale
        if difference > BOUND:
            complaints.append(f"{name}: differs by {difference:.2e}")
    if (alone - expected).abs().max().item() / scale < 100 * BOUND:
        complaints.append("the adapter changes nothing")
    difference = (on_top - expected).abs().max().item() / scale
    print(f"{pathlib.Path(case['adapter']).name}: {difference:.1e}", *complaints, sep="\n    ")
    return not complaints


if __name__ == "__main__":
    cases = json.loads(pathlib.Path(sys.argv[1]).read_text())
    sys.exit(0 if all([check(case) for case in cases]) else 1)

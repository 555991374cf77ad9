"""Load an adapter that `moe-merge finetune` wrote with PEFT, on the model it was made for, and compare logits.

usage: check_adapter.py MODEL ADAPTER TOKENS LOGITS.safetensors

LOGITS is what `moe-merge logits MODEL+ADAPTER --tokens TOKENS --out LOGITS` wrote. Prints one line of JSON: the largest
difference as a share of the largest logit, the same without the adapter, and keys of the adapter that PEFT had no place for.
"""

import json
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model, adapter, tokens, logits = sys.argv[1:5]
ids = torch.tensor([[int(t) for t in tokens.split(",")]])
wanted = load_file(logits)["logits"]
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()


def apart(model):
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits[0]
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


plain = apart(base)
tuned = PeftModel.from_pretrained(base, adapter).eval()
file = load_file(f"{adapter}/adapter_model.safetensors")
placed = {n.replace(".default", "") for n, _ in tuned.named_parameters() if "lora_" in n}
print(json.dumps({"apart": apart(tuned), "plain": plain, "unplaced": sorted(set(file) - placed)}))

"""Load folders that moe-merge wrote with transformers, as anybody would, and compare.

usage: check_load.py CASES.json

CASES.json is a list of
    name      shown in the report
    folder    what moe-merge wrote
    logits    what `moe-merge logits FOLDER --tokens TOKENS --out LOGITS` wrote
    tokens    the same tokens
    bound     largest difference allowed, as a share of the largest logit
    class     the class that has to come out
    config    values that transformers has to read from config.json
    source    the folder whose tokenizer and generation settings have to come out (optional)

Weights are widened to f32. Prints one line of JSON for each case and exits with 1 if any has a complaint. Works with
transformers 4.57 and 5.
"""

import json
import pathlib
import sys

import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

TEXTS = ["fn main() { let x = 12; }\n", " Two  spaces,\ttabs and ünïcode ✓.", "17 * 9 = 153, so 153 / 17 = 9.\n\n"]


def setting(config, key):
    """A value as the model code of this version reads it."""
    if key in ("rope_theta", "rope_type") and hasattr(config, "rope_parameters"):
        return config.rope_parameters[key]
    if key == "rope_type":
        return (config.rope_scaling or {"rope_type": "default"})["rope_type"]
    if key == "dtype":
        return str(config.dtype if hasattr(config, "dtype") else config.torch_dtype).removeprefix("torch.")
    if key == "sliding_window":
        return getattr(config, key) or None  # version 5 turns null into 0 for Qwen2-MoE; both mean none
    return getattr(config, key)


def check_tokenizer(ours, source):
    complaints = []
    a = AutoTokenizer.from_pretrained(ours)
    # Not AutoTokenizer: for some model types it ignores what tokenizer.json says, and 4.x cannot name classes of 5.x.
    b = tokenizers.Tokenizer.from_file(str(pathlib.Path(source) / "tokenizer.json"))
    settings = json.loads((pathlib.Path(source) / "tokenizer_config.json").read_text())
    texts = list(TEXTS)
    if extra := set(a("text")) - {"input_ids", "attention_mask"}:
        complaints.append(f"the tokenizer returns {sorted(extra)}, which the model does not take")
    if a.chat_template != settings.get("chat_template"):
        complaints.append("chat template differs")
    if a.chat_template:
        talk = [{"role": "user", "content": "What is 2 + 2?"}]
        texts.append(a.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    for text in texts:
        if a(text)["input_ids"] != b.encode(text).ids:
            complaints.append(f"tokens of {text!r} differ")
    for key in ("bos_token", "eos_token", "pad_token"):
        if getattr(a, key) != settings.get(key):
            complaints.append(f"tokenizer's {key}: {getattr(a, key)} instead of {settings.get(key)}")
    if (pathlib.Path(source) / "generation_config.json").exists():
        a, b = GenerationConfig.from_pretrained(ours), GenerationConfig.from_pretrained(source)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p"):
            if getattr(a, key) != getattr(b, key):
                complaints.append(f"generation {key}: {getattr(a, key)} instead of {getattr(b, key)}")
    return complaints


def check(case):
    complaints = []
    config = AutoConfig.from_pretrained(case["folder"])
    for key, expected in case["config"].items():
        found = setting(config, key)
        if found != expected:
            complaints.append(f"config {key}: {found} instead of {expected}")
    model, info = AutoModelForCausalLM.from_pretrained(
        case["folder"], dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            complaints.append(f"{kind}: {sorted(map(str, info[kind]))}")
    if type(model).__name__ != case["class"]:
        complaints.append(f"class {type(model).__name__} instead of {case['class']}")
    expected = load_file(case["logits"])["logits"]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([case["tokens"]])).logits[0].float()
    difference = ((logits - expected).abs().max() / logits.abs().max()).item()
    if not difference <= case["bound"]:
        complaints.append(f"logits differ by {difference:.2e}, more than {case['bound']:.0e}")
    if "source" in case:
        # The tokenizer is copied byte for byte, and 4.x cannot name the class that 5.x writes.
        settings = json.loads((pathlib.Path(case["source"]) / "tokenizer_config.json").read_text())
        if transformers.__version__[0] != "4" or settings.get("tokenizer_class") != "TokenizersBackend":
            complaints += check_tokenizer(case["folder"], case["source"])
    return {"name": case["name"], "difference": difference, "complaints": complaints}


def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = False
    for case in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        try:
            report = check(case)
        except Exception as e:  # one folder that does not load must not hide the others
            report = {"name": case["name"], "difference": None, "complaints": [f"{type(e).__name__}: {e}"]}
        failed |= bool(report["complaints"])
        print(json.dumps(report | {"transformers": transformers.__version__}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Losses of twenty steps of plain gradient descent on LoRA factors, as PEFT takes them.

Usage: python make_peft.py OUT_DIR MOE DENSE     (torch 2.15, transformers 5.23.0, peft 0.21.2, CPU, float32, eager attention)

For each checkpoint `OUT_DIR/NAME.safetensors` holds `input_ids` [steps, sequences, tokens], `loss` [steps] (mean cross
entropy of all tokens but the first of each sequence, before the step), and the first factors `LAYER.PART.a` [rank, in] and
`LAYER.PART.b` [out, rank] with their last values `LAYER.PART.a_last`, `..b_last`.

Of the MoE one expert is trained. PEFT cannot do that: it has one pair of factors for all experts of a layer. Here the
gradients of the other experts' parts, and those between gate and up, are set to 0 by hooks, and so are their first values.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

STEPS, RATE, RANK, ALPHA, EXPERT = 20, 0.5, 3, 4.0, 1
PARTS = ["gate", "up", "down"]


def train(model, vocab, generator):
    ids = torch.randint(3, vocab, (STEPS, 4, 24), generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.SGD(trained, lr=RATE), []
    for batch in ids:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {"input_ids": ids, "loss": torch.tensor(losses)}


def noise(parameter, generator, width):
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)


def dense(folder, generator):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    targets = [f"{p}_proj" for p in PARTS]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"))
    pairs = {}
    for layer, block in enumerate(model.base_model.model.model.layers):
        for part in PARTS:
            module = getattr(block.mlp, f"{part}_proj")
            pairs[f"{layer}.{part}"] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    for a, b in pairs.values():
        noise(a, generator, 0.2)
        noise(b, generator, 0.2)
    first = {f"{n}.{f}": p.detach().clone() for n, pair in pairs.items() for f, p in zip("ab", pair)}
    result = train(model, model.config.vocab_size, generator) | first
    return result | {f"{n}.{f}_last": p.detach().clone() for n, pair in pairs.items() for f, p in zip("ab", pair)}


def moe(folder, generator):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    experts, inner = model.config.num_local_experts, model.config.intermediate_size
    rank = 2 * RANK
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * ALPHA, target_modules=[], target_parameters=names, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    rows = slice(EXPERT * rank, (EXPERT + 1) * rank)
    parts = {}
    for layer, block in enumerate(model.base_model.model.model.layers):
        outer = block.mlp.experts
        inside = outer.base_layer
        for module, fused in ((inside, True), (outer, False)):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            masks = torch.zeros_like(a), torch.zeros_like(b)
            columns = [j * experts + EXPERT for j in range(rank)]
            if fused:
                masks[0][rows] = 1
                for half in range(2):
                    for j in range(RANK):
                        masks[1][half * inner : (half + 1) * inner, columns[half * RANK + j]] = 1
            else:
                masks[0][EXPERT * rank : EXPERT * rank + RANK] = 1
                masks[1][:, columns[:RANK]] = 1
            for parameter, mask in zip((a, b), masks):
                noise(parameter, generator, 0.3)
                with torch.no_grad():
                    parameter.mul_(mask)
                parameter.register_hook(lambda g, mask=mask: g * mask)
            own = lambda p, first: p[:, columns][:, first : first + RANK]
            if fused:
                for half, part in enumerate(PARTS[:2]):
                    first = half * RANK
                    parts[f"{layer}.{part}"] = (
                        lambda a=a, f=first: a[rows][f : f + RANK],
                        lambda b=b, f=first, h=half: own(b, f)[h * inner : (h + 1) * inner],
                    )
            else:
                parts[f"{layer}.down"] = (lambda a=a: a[rows][:RANK], lambda b=b: own(b, 0))
    take = lambda end: {f"{n}.{f}{end}": get().detach().clone() for n, pair in parts.items() for f, get in zip("ab", pair)}
    first = take("")
    return train(model, model.config.vocab_size, generator) | first | take("_last")


def main(out: Path, moe_folder: Path, dense_folder: Path) -> None:
    out.mkdir(exist_ok=True)
    for name, make, folder in (("moe", moe, moe_folder), ("dense", dense, dense_folder)):
        result = make(folder, torch.Generator().manual_seed(7))
        print(name, [round(v, 5) for v in result["loss"].tolist()])
        save_file({k: v.contiguous() for k, v in result.items()}, out / f"{name}.safetensors")


torch.set_num_threads(1)
main(*map(Path, sys.argv[1:4]))

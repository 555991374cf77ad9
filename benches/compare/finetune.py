"""Fine-tuning: moe-merge on one expert beside PEFT on all of them, in turn.

usage: finetune.py MOE-MERGE MOE [options]

Runs both on the same folder, with the same text, rank, batches and threads, and prints the median of tokens/s and the
peak memory of each side. PEFT adapts the experts of transformers 5 (`target_parameters`): all of them, since it cannot
adapt one. Needs the environment of `setup.sh FOLDER torch` with `pip install peft`.

options: --text FILE  --expert NAME  --threads N  --steps N  --rounds N  --sequence N  --batch N  --rank N
         --dtype bf16|f32 (of PEFT; moe-merge reads weights as they are and computes in f32)
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time


def peft(args) -> None:
    """One run of PEFT, in a process of its own; prints JSON."""
    import resource

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.moe, dtype=dtype)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=[], target_parameters=names, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = AutoTokenizer.from_pretrained(args.moe)(pathlib.Path(args.text).read_text(), add_special_tokens=False)["input_ids"]
    size, speeds = args.batch * args.sequence, []
    for step in range(args.steps):
        part = torch.tensor(ids[step * size : (step + 1) * size]).view(args.batch, args.sequence)
        start = time.perf_counter()
        loss = model(input_ids=part, labels=part, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        speeds.append(size / (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"speed": statistics.median(speeds[1:]), "peak": peak, "loss": loss.item()}))


def ours(args, folder: str) -> dict:
    command = [args.program, "finetune", args.moe, "--expert", args.expert, "--keep", "0", "--data", args.text, "--out", f"{folder}/out"]
    command += ["--rank", args.rank, "--steps", args.steps, "--window", args.sequence, "--hold-out", 0, "--eval-tokens", 2]
    command += ["--batch-tokens", args.batch * args.sequence, "--learning-rate", 1e-4, "--threads", args.threads, "--json"]
    measured = ["/usr/bin/time", "-f", "%M"] if os.path.exists("/usr/bin/time") else []
    child = subprocess.Popen([*measured, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = child.communicate()
    if child.returncode:
        sys.exit(err)
    report = json.loads(out)
    peak = int(err.split()[-1]) * 1024 if measured else float("nan")
    return {"speed": report["tokens_per_second"], "peak": peak, "loss": report["loss"][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("moe")
    parser.add_argument("--text", required=True)
    parser.add_argument("--expert", default="0")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--peft", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peft:
        return peft(args)
    runs = {"peft": [], "moe-merge": []}
    for _ in range(args.rounds):
        command = [sys.executable, __file__, *sys.argv[1:], "--peft"]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            sys.exit(child.stderr)
        runs["peft"].append(json.loads(child.stdout.splitlines()[-1]))
        with tempfile.TemporaryDirectory() as folder:
            runs["moe-merge"].append(ours(args, folder))
    median = {side: {k: statistics.median(r[k] for r in all) for k in all[0]} for side, all in runs.items()}
    for side, all in runs.items():
        speeds = sorted(r["speed"] for r in all)
        shown = f"{speeds[0]:.0f} to {speeds[-1]:.0f}"
        print(f"{side:9}  {median[side]['speed']:6.0f} tokens/s ({shown}), peak {median[side]['peak'] / 1e9:.2f} GB")
    speed = median["moe-merge"]["speed"] / median["peft"]["speed"]
    peak = median["moe-merge"]["peak"] / median["peft"]["peak"]
    print(f"ratio      {speed:6.2f} x the tokens/s, {peak:.2f} x the memory ({args.dtype}, {args.threads} threads)")


main()

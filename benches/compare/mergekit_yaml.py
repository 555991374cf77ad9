#!/usr/bin/env python3
"""The same dense merges with moe-merge and with mergekit-yaml, in turn, and what reading and writing the bytes alone takes.

usage: mergekit_yaml.py MOE_MERGE_BINARY MERGEKIT_PYTHON WORKDIR BASE [--rounds N] [--methods NAME...]

BASE is a checkpoint folder, for instance SmolLM2-135M in bf16. Three fine-tunes are made of it by seeded noise, so that every
tensor of every model differs. MERGEKIT_PYTHON comes from `python -m venv v && v/bin/pip install torch mergekit`: then it is
v/bin/python. Every round runs mergekit-yaml, moe-merge and the floor one after the other, files in the page cache; the medians
are printed. `start` is what `mergekit-yaml --help` takes: the time in which it imports its libraries. The floor reads every
input once, writes the output's bytes once, and syncs them to the disk as moe-merge does (mergekit does not).
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import time

NOISE = """
import sys, pathlib, shutil, torch
from safetensors.torch import load_file, save_file
base, out, seed = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
draw = torch.Generator().manual_seed(seed)
shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors", ".moe-merge"))
for file in base.glob("*.safetensors"):
    tensors = load_file(file)
    for name, w in tensors.items():
        # A fine-tune moves a weight by about a twentieth of its spread.
        noise = torch.randn(w.shape, generator=draw) * (0.05 * w.float().std())
        tensors[name] = (w.float() + noise).to(w.dtype)
    save_file(tensors, out / file.name, metadata={"format": "pt"})
"""
MODELS = ["a", "b", "c"]
# Method: models beside the base (None: no base), parameters of each model, parameters of the merge.
METHODS = {
    "linear": (None, 3, {"weight": 1}, {}),
    "karcher": (None, 3, {}, {}),
    "slerp": ("base", 1, {}, {"t": 0.4}),
    "task_arithmetic": ("base", 2, {"weight": 0.5}, {}),
    "ties": ("base", 2, {"weight": 0.5, "density": 0.5}, {}),
    "dare_linear": ("base", 2, {"weight": 0.5, "density": 0.5}, {}),
    "dare_ties": ("base", 2, {"weight": 0.5, "density": 0.5}, {}),
    "della": ("base", 2, {"weight": 0.5, "density": 0.5}, {}),
    "breadcrumbs": ("base", 2, {"weight": 0.5, "density": 0.9}, {}),
    "model_stock": ("base", 2, {}, {}),
    "nuslerp": (None, 2, {"weight": 1}, {}),
    "multislerp": (None, 3, {"weight": 1}, {}),
    "sce": ("base", 2, {}, {"select_topk": 0.5}),
    "nearswap": ("base", 1, {}, {"t": 0.001}),
    "arcee_fusion": ("base", 1, {}, {}),
    "passthrough": (None, 1, {}, {}),
}


def timed(command: list) -> tuple[float, int]:
    """Seconds, and peak resident kilobytes of the process."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{command} failed with status {status}: {error.decode()[-2000:]}")
    return seconds, usage.ru_maxrss


def weights(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.safetensors"))


def floor(inputs: list[pathlib.Path], output: pathlib.Path, copy: pathlib.Path) -> float:
    """Seconds to read `inputs` and to write the files of `output` to the disk."""
    content = [f.read_bytes() for f in weights(output)]
    buffer = bytearray(1 << 20)
    start = time.perf_counter()
    for file in (f for folder in inputs for f in weights(folder)):
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    copy.mkdir()
    for i, data in enumerate(content):
        with open(copy / str(i), "wb", buffering=0) as f:
            for at in range(0, len(data), 1 << 20):
                f.write(memoryview(data)[at : at + (1 << 20)])
            os.fsync(f.fileno())
    folder = os.open(copy, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("moe_merge", type=pathlib.Path)
    parser.add_argument("python", type=pathlib.Path)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("base", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ours-alone", action="store_true", help="leave mergekit out")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    folder = {"base": args.base.resolve()}
    for seed, name in enumerate(MODELS, 1):
        folder[name] = args.workdir.resolve() / name
        if not folder[name].exists():
            subprocess.run([args.python, "-c", NOISE, folder["base"], folder[name], str(seed)], check=True)
    mergekit = [args.python, "-m", "mergekit.scripts.run_yaml"]
    start = 0.0
    if not args.ours_alone:
        timed([*mergekit, "--help"])
        start = statistics.median(timed([*mergekit, "--help"])[0] for _ in range(args.rounds))
        print(f"start of mergekit-yaml: {start:.2f} s")
    print(f"{'method':16}{'mergekit':>10}{'- start':>9}{'ours':>8}{'ratio':>7}{'- start':>9}{'floor':>8}{'of floor':>10}{'MB':>6}")
    for method in args.methods:
        base, count, own, merge = METHODS[method]
        models = MODELS[:count]
        recipe = {"merge_method": method, "dtype": "bfloat16", "parameters": merge}
        recipe["models"] = [{"model": str(folder[m]), "parameters": own} for m in models]
        if base:
            recipe["base_model"] = str(folder[base])
        yaml = args.workdir / f"{method}.yaml"
        yaml.write_text(json.dumps(recipe, indent=1) + "\n")  # JSON is YAML
        inputs = [folder[m] for m in ([base] if base else []) + models]
        theirs, ours, copy = (args.workdir / n for n in ("theirs", "ours", "copy"))
        times: dict[str, list] = {"theirs": [], "ours": [], "floor": []}
        peak = 0
        for _ in range(args.rounds):
            for out in (theirs, ours, copy):
                shutil.rmtree(out, ignore_errors=True)
            os.sync()  # one run's bytes do not wait for another's
            if not args.ours_alone:
                times["theirs"].append(timed([*mergekit, yaml, theirs, "--num-threads", args.threads, "--quiet"])[0])
                shutil.rmtree(theirs)
                os.sync()
            seconds, kilobytes = timed([args.moe_merge, yaml, "--out", ours, "--threads", args.threads, "--quiet"])
            times["ours"].append(seconds)
            peak = max(peak, kilobytes)
            times["floor"].append(floor(inputs, ours, copy))
        of = {name: statistics.median(t) if t else float("nan") for name, t in times.items()}
        print(
            f"{method:16}{of['theirs']:10.2f}{of['theirs'] - start:9.2f}{of['ours']:8.3f}{of['theirs'] / of['ours']:7.1f}"
            f"{(of['theirs'] - start) / of['ours']:9.1f}{of['floor']:8.3f}{of['ours'] / of['floor']:10.2f}{peak / 1024:6.0f}",
            flush=True,
        )
    for out in (theirs, ours, copy):
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()

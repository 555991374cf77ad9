"""Build the same 4-expert MoE with moe-merge, with mergekit-moe and (the bytes alone) with cp, in turn.

usage: mergekit_moe.py MOE_MERGE_BINARY MERGEKIT_MOE_BINARY WORKDIR BASE EXPERT... [--rounds N]

BASE and EXPERT are dense checkpoints of one family, for instance SmolLM2-135M and fine-tunes of it. MERGEKIT_MOE_BINARY
comes from `python -m venv v && v/bin/pip install torch mergekit`: then it is v/bin/mergekit-moe. Every round runs the three
one after the other; medians, their ratios and the peak resident memory are printed as JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time

PROMPTS = {
    0: ["fn main() { let x = vec![1, 2, 3]; println!(\"{:?}\", x); }", "impl Iterator for Counter { type Item = u32; }"],
    1: ["12 + 30 = 42. Then 42 - 30 = 12.", "Solve 9x + 16 = 124. Subtract 16: 9x = 108."],
    2: ["And it came to pass in those days, that the king spake unto the people.", "Behold, the waters prevailed."],
    3: ["The museum opens at nine in the morning and closes at six.", "Photosynthesis turns sunlight into sugar."],
}


def recipe(path: str, base: str, experts: list[str], gate_mode: str) -> None:
    lines = [f"base_model: {base}", f"gate_mode: {gate_mode}", "dtype: bfloat16", "experts_per_token: 2", "experts:"]
    for i, expert in enumerate(experts):
        lines += [f"  - source_model: {expert}", "    positive_prompts:"]
        lines += [f"      - {json.dumps(p)}" for p in PROMPTS[i % len(PROMPTS)]]
    with open(path, "w") as f:
        f.write("\n".join(lines) + "\n")


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds, and peak resident kilobytes of the process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{command[0]} failed with status {status}: {error.decode()[-2000:]}")
    return seconds, usage.ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("moe_merge")
    parser.add_argument("mergekit")
    parser.add_argument("workdir")
    parser.add_argument("base")
    parser.add_argument("experts", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gate-mode", default="hidden")
    args = parser.parse_args()

    os.makedirs(args.workdir, exist_ok=True)
    yaml = os.path.join(args.workdir, "recipe.yaml")
    random = os.path.join(args.workdir, "random.yaml")
    experts = [os.path.abspath(e) for e in args.experts]
    recipe(yaml, os.path.abspath(args.base), experts, args.gate_mode)
    recipe(random, os.path.abspath(args.base), experts, "random")
    ours, theirs, copy = (os.path.join(args.workdir, n) for n in ("ours", "mergekit", "copy"))
    runs: dict[str, list[tuple[float, int]]] = {"moe_merge": [], "moe_merge_without_probe": [], "cp": [], "mergekit_moe": []}
    for _ in range(args.rounds):
        for folder in (ours, theirs, copy):
            shutil.rmtree(folder, ignore_errors=True)
        runs["moe_merge"].append(timed([args.moe_merge, yaml, "--out", ours, "--quiet"]))
        runs["cp"].append(timed(["cp", "-r", ours, copy]))
        shutil.rmtree(ours)
        runs["moe_merge_without_probe"].append(timed([args.moe_merge, random, "--out", ours, "--quiet"]))
        runs["mergekit_moe"].append(timed([args.mergekit, yaml, theirs]))
    size = sum(os.path.getsize(os.path.join(ours, f)) for f in os.listdir(ours) if os.path.isfile(os.path.join(ours, f)))
    seconds = {name: statistics.median(s for s, _ in all_) for name, all_ in runs.items()}
    report = {
        "rounds": args.rounds,
        "output_bytes": size,
        "median_seconds": seconds,
        "spread_seconds": {n: [min(s for s, _ in r), max(s for s, _ in r)] for n, r in runs.items()},
        "peak_rss_mb": {n: max(m for _, m in r) / 1024 for n, r in runs.items()},
        "without_probe_over_cp": seconds["moe_merge_without_probe"] / seconds["cp"],
        "mergekit_over_ours": seconds["mergekit_moe"] / seconds["moe_merge"],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time of `swap` and `rollback` beside the time that `cp` needs for the same bytes, in turn.

    python3 benches/compare/swap.py --moe merged/smollm2 --binary target/release/moe-merge [--where /tmp] [--rounds 7]

The MoE is copied first; experts 1, 2, ... of the original take the place of expert 0 of the copy.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moe", required=True, help="MoE folder with a file for each expert")
    parser.add_argument("--binary", default="target/release/moe-merge")
    parser.add_argument("--where", default="/tmp", help="folder for the copies")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def timed(run):
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def copy(source, target):
    """`cp`, then the bytes on the disk, as a change of a model has to have them."""
    subprocess.run(["cp", source, target], check=True)
    handle = os.open(target, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def call(binary, *args):
    done = subprocess.run([binary, *args, "--json", "--quiet"], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def shown(seconds):
    median = 1000 * statistics.median(seconds)
    return f"{median:.0f} ms ({1000 * min(seconds):.0f} to {1000 * max(seconds):.0f})"


def main():
    args = arguments()
    target = os.path.join(args.where, "swap-bench")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(args.moe, target)
    files = [f for f in os.listdir(args.moe) if f.startswith("model-expert-")]
    experts = len(files)
    source = os.path.join(args.moe, sorted(files)[1])
    with open(source, "rb") as file:
        file.read()
    beside = os.path.join(args.where, "swap-bench.bin")
    copies, swaps, differences, rollbacks = [], [], [], []
    for turn in range(args.rounds):
        copied, _ = timed(lambda: copy(source, beside))
        os.remove(beside)
        other = f"{args.moe}#{1 + turn % (experts - 1)}"
        swapped, report = timed(
            lambda: call(args.binary, "swap", target, "--expert", "0", "--with", other, "--no-forecast")
        )
        back, _ = timed(lambda: call(args.binary, "rollback", target))
        timed(lambda: call(args.binary, "history", target, "--prune"))
        copies.append(copied)
        swaps.append(swapped)
        differences.append(swapped - copied)
        rollbacks.append(back)
    expert = os.path.getsize(source)
    print(f"an expert is {expert} bytes; a swap wrote {report['bytes_written']} (shard and index)")
    print(f"cp and fsync of it {shown(copies)}; swap, whole process {shown(swaps)}")
    print(f"swap beside the copy {shown(differences)}; rollback, whole process {shown(rollbacks)}")
    shutil.rmtree(target)


main()

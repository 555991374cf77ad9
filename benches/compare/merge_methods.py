#!/usr/bin/env python3
"""Every merge method on four fine-tunes of one base: how much of what each fine-tune gained is left in one dense model.

    cargo build --release
    benches/compare/merge_methods.py target/release/moe-merge ../shared/models/tiny

For each method and a few factors on the merged task vector it prints, per domain, the share of the fine-tune's gain over the
base (nats per token on held-out text) that the merge keeps, their mean, and the worst. The factor is chosen on the first half
of each evaluation text and the row is measured on the second. Methods that look at activations do so on text that the models
write themselves. Names of methods after the folder limit the table to these.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

DOMAINS = ["prose", "code", "math", "facts"]
# Method, whether it takes a base, parameters of each model, parameters of the merge.
METHODS = [
    ("linear", False, {"weight": 1}, {}),
    ("karcher", False, {}, {}),
    ("multislerp", False, {"weight": 1}, {}),
    ("model_stock", True, {}, {}),
    ("task_arithmetic", True, {"weight": 1}, {}),
    ("ties", True, {"weight": 1, "density": 0.2}, {}),
    ("ties", True, {"weight": 1, "density": 0.5}, {}),
    ("dare_linear", True, {"weight": 1, "density": 0.5}, {}),
    ("dare_ties", True, {"weight": 1, "density": 0.5}, {}),
    ("della", True, {"weight": 1, "density": 0.5}, {"normalize": False}),
    ("breadcrumbs", True, {"weight": 1, "density": 0.9}, {}),
    ("sce", True, {}, {"select_topk": 0.5}),
    ("ram", True, {}, {}),
    ("ramplus_tl", True, {}, {}),
    ("iso_c", True, {}, {}),
    ("tsv", True, {}, {}),
    ("regmean", False, {}, {"alpha": 0.9}),
    ("regmean", False, {}, {"alpha": 1.0}),
    ("regmean_stream", False, {}, {}),
]
FACTORS = [0.25, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2]
WITH_LAMBDA = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "iso_c", "tsv"}


def run(tool, *args):
    return subprocess.run([tool, *map(str, args)], check=True, capture_output=True, text=True).stdout


def nats(tool, model, texts):
    report = json.loads(run(tool, "perplexity", model, "--json", "--text", *texts))
    return [f["nats_per_token"] for f in report["files"]]


def recipe(models, method, base, own, merge):
    lines = [f"merge_method: {method}", "dtype: float32", f"parameters: {json.dumps(merge)}", "models:"]
    if base:
        lines.insert(1, f"base_model: {models / 'base'}")
    lines += [f"- {{model: {models / d}, parameters: {json.dumps(own)}}}" for d in DOMAINS]
    return "\n".join(lines) + "\n"


def main():
    tool, models = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory() as temp:
        temp = pathlib.Path(temp)
        halves = [[], []]
        for d in DOMAINS:
            text = (models / f"eval_{d}.txt").read_text()
            cut = text.index("\n", len(text) // 2)
            for half, part in zip(halves, (text[:cut], text[cut:])):
                path = temp / f"{d}_{len(halves[0])}_{len(halves[1])}.txt"
                path.write_text(part)
                half.append(path)
        files = halves[0] + halves[1]
        base = nats(tool, models / "base", files)
        own = [nats(tool, models / d, [halves[0][i], halves[1][i]]) for i, d in enumerate(DOMAINS)]
        own = [o[0] for o in own] + [o[1] for o in own]
        print(f"{'method':34}" + "".join(f"{d:>8}" for d in DOMAINS) + f"{'mean':>8}{'worst':>8}")
        for method, needs_base, each, merge in [m for m in METHODS if m[0] in sys.argv[3:] or not sys.argv[3:]]:
            best = None
            for factor in FACTORS if method in WITH_LAMBDA else [1.0]:
                settings = {**merge, "lambda": factor} if method in WITH_LAMBDA else merge
                path = temp / "recipe.yaml"
                path.write_text(recipe(models, method, needs_base, each, settings))
                out = temp / "merged"
                run(tool, path, "--out", out, "--force", "--quiet")
                merged = nats(tool, out, files)
                kept = [(b - m) / (b - o) for b, m, o in zip(base, merged, own)]
                chosen_on, measured_on = kept[:4], kept[4:]
                if best is None or sum(chosen_on) > best[0]:
                    best = (sum(chosen_on), factor, measured_on)
            _, factor, kept = best
            name = method + "".join(f" {k}={v}" for k, v in {**each, **merge}.items() if k != "weight")
            name += f" lambda={factor}" if method in WITH_LAMBDA else ""
            print(f"{name:34}" + "".join(f"{100 * k:7.1f}%" for k in kept) + f"{25 * sum(kept):7.1f}%{100 * min(kept):7.1f}%", flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What shrinking a MoE costs, and what fitting its routers anew gives back.

    cargo build --release
    benches/compare/shrink.py target/release/moe-merge ../shared/models/tiny

Makes a MoE of the four fine-tunes, and one of eight experts, in which each fine-tune has a twin with noise on its weights. Each is
shrunk; per domain it prints the nats per token on held-out text of the base, of the MoE, of the shrunk MoE, and of that after
`calibrate`, for which the experts write their own text.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

DOMAINS = ["prose", "code", "math", "facts"]
NOISE = 0.01
TOKENS = 5000


def main():
    tool, models = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    prompts = json.loads((models / "prompts.json").read_text())
    texts = [models / f"eval_{d}.txt" for d in DOMAINS]

    def run(*args):
        return subprocess.run([tool, *map(str, args)], check=True, capture_output=True, text=True).stdout

    def row(name, model):
        report = json.loads(run("perplexity", model, "--json", "--text", *texts))
        nats = [f["nats_per_token"] for f in report["files"]]
        print(f"{name:30}" + "".join(f"{n:8.3f}" for n in nats) + f"{sum(nats) / 4:8.3f}", flush=True)

    def build(out, twins):
        experts = []
        for noise in [0, NOISE][: 1 + twins]:
            for d in DOMAINS:
                name = d if noise == 0 else f"{d}2"
                experts.append({"source_model": str(models / d), "name": name, "noise_scale": noise, "positive_prompts": prompts[d]})
        recipe = {"base_model": str(models / "base"), "experts": experts, "self_text": TOKENS}
        path = out.with_suffix(".yaml")
        path.write_text(json.dumps(recipe))
        run(path, "--out", out, "--quiet")

    with tempfile.TemporaryDirectory() as temp:
        temp = pathlib.Path(temp)
        print(f"{'nats per token':30}" + "".join(f"{d:>8}" for d in DOMAINS) + f"{'mean':>8}")
        row("base", models / "base")
        for count, twins, targets in [(4, False, [3, 2]), (8, True, [4, 2])]:
            moe = temp / f"moe{count}"
            build(moe, twins)
            row(f"{count} experts", moe)
            for target in targets:
                out = temp / f"moe{count}-{target}"
                report = json.loads(run("shrink", moe, "--experts", target, "--text", *texts, "--out", out, "--json"))
                loss = sum(layer["loss"] for layer in report["layers"]) / len(report["layers"])
                row(f"{count} to {target} (lost {100 * loss:.1f} %)", out)
                run("calibrate", out, "--self-text", TOKENS, "--quiet")
                row(f"{count} to {target}, calibrated", out)


if __name__ == "__main__":
    main()

"""Run the same model and prompt with moe-merge and its peers, in turn, and print tokens per second and ratios.

usage: runtime.py MODEL_FOLDER MODEL.gguf MOE_MERGE_BINARY --peers FOLDER [options]

setup.sh makes FOLDER. MODEL.gguf holds the same weights for llama.cpp: `moe-merge export MODEL_FOLDER --gguf FILE`, or
`FOLDER/torch/bin/python FOLDER/converter/convert_hf_to_gguf.py MODEL_FOLDER --outtype bf16 --outfile FILE`. With --dense
and --dense-gguf a dense model is compared with llama.cpp too.

Every engine is a process that has loaded its model and answered once before anything is timed. A round runs moe-merge and
one peer right after each other, then moe-merge and the next one; who goes first changes from round to round. Printed are
medians over the rounds, of speeds and of the ratios within pairs, with the smallest and largest ratio. moe-merge is the
example `compare_ours` where it lies beside the binary (`cargo build --release --example compare_ours`), and the command
`generate` itself, a new process each time, in one more row: that one also pays for the first touch of every page of the file.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
TEXTS = [HERE.parent.parent / "recipes" / "smollm2" / f"eval_{name}.txt" for name in ("rust", "arithmetic", "general")]

# What ours has to reach: (model, instruction set, peer) -> (prefill, decode), each (bar, stretch).
BARS = {
    ("moe", "native", "llama.cpp"): ((2.2, 3.2), (1.15, 1.3)),
    ("moe", "native", "transformers"): ((1.15, 1.6), (3.0, 3.0)),
    ("dense", "native", "llama.cpp"): ((1.0, 1.0), (1.0, 1.0)),
    ("moe", "avx2", "llama.cpp"): ((1.0, 1.0), (1.0, 1.0)),
    ("dense", "avx2", "llama.cpp"): ((1.0, 1.0), (1.0, 1.0)),
}


class Failure(Exception):
    """An engine that cannot be measured, and why."""


class Worker:
    """An engine in a process that stays."""

    def __init__(self, name: str, command: list, environment: dict[str, str]):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [str(c) for c in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **environment},
        )
        hello = self.read()
        self.engine, self.detail = hello["engine"], hello["detail"]

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip()[-600:]
        raise Failure(f"{self.name} ended with status {self.process.returncode}: {said or 'it said nothing'}")

    def ask(self, prompt: dict, new: int) -> dict:
        try:
            self.process.stdin.write(json.dumps({"prompt": prompt["ids"], "new": new}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `read` says why.
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


class Command:
    """`moe-merge generate`, a new process each time."""

    name, detail = "ours (command)", "a new process each time"

    def __init__(self, binary: pathlib.Path, model: pathlib.Path, threads: int, environment: dict[str, str]):
        self.arguments = [binary, "generate", model, "--json", "--quiet", "--ignore-eos", "--threads", threads]
        self.environment = {**os.environ, **environment}
        self.engine = "moe-merge generate"

    def command(self, text: str, new: int) -> list[str]:
        return [str(a) for a in [*self.arguments, "--prompt", text, "--max-new-tokens", new]]

    def ask(self, prompt: dict, new: int) -> dict:
        done = subprocess.run(self.command(prompt["text"], new), env=self.environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failure(f"moe-merge ended with status {done.returncode}: {done.stderr.strip()[-600:]}")
        found = json.loads(done.stdout)
        if found["prompt_tokens"] != len(prompt["ids"]):
            raise Failure(f"moe-merge reads {found['prompt_tokens']} tokens, the peers {len(prompt['ids'])}")
        decode = found["decode_tokens_per_second"]
        return {
            "prefill_seconds": found["prompt_tokens"] / found["prefill_tokens_per_second"],
            "decode_seconds": (new - 1) / decode if decode else 0.0,
            "tokens": found["tokens"],
        }

    def memory(self, new: int) -> dict:
        """Peak resident bytes: of all memory, and of that which is no page of a file (looked at every half millisecond)."""
        process = subprocess.Popen(self.command("The", new), env=self.environment, stdout=subprocess.DEVNULL)
        peak = {"anonymous": 0}
        ended = threading.Event()

        def watch() -> None:
            while not ended.is_set():
                try:
                    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    return
                for line in status.splitlines():
                    if line.startswith("RssAnon:"):
                        peak["anonymous"] = max(peak["anonymous"], int(line.split()[1]) * 1024)
                time.sleep(0.0005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        ended.set()
        watcher.join()
        if status != 0:
            raise Failure(f"moe-merge ended with wait status {status}")
        return {"resident": usage.ru_maxrss * 1024, "anonymous": peak["anonymous"]}

    def close(self) -> None:
        pass


def engines(args, kind: str, model: pathlib.Path, gguf: pathlib.Path, threads: int, isa: str):
    """Ours (one or two), the peers that are there, and why others are not."""
    single = {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    ours = {} if isa == "native" else {"MOE_MERGE_ISA": isa}
    worker = args.binary.parent / "examples" / "compare_ours"
    command = Command(args.binary, model, threads, ours)
    llama = args.peers / ("llama" if isa == "native" else f"llama-{isa}") / "bin" / "python"
    torch = args.peers / "torch" / "bin" / "python"
    candle = args.peers / "candle-mixtral"
    mine, peers, absent = [command], [], []
    if worker.exists():
        mine.insert(0, lambda: Worker("ours", [worker, model, threads], ours))
    else:
        absent.append(f"ours in a process that stays: {worker} is not there")
    wanted = [("llama.cpp", llama, lambda: [llama, HERE / "engines.py", "llama", gguf, threads])]
    if kind == "moe" and isa == "native":
        run = [torch, HERE / "engines.py", "transformers", model, threads, args.experts]
        wanted.append(("transformers", torch, lambda: run))
        wanted.append(("candle (f32)", candle, lambda: [candle, model]))
        absent.append("mistral.rs: " + mistralrs(args.peers))
    for name, needs, start in wanted:
        if name.split(" ")[0] not in args.engines:
            continue
        if needs.exists():
            peers.append(lambda name=name, start=start: Worker(name, start(), single))
        else:
            absent.append(f"{name}: {needs} is not there, setup.sh makes it")
    return mine, peers, absent


def mistralrs(peers: pathlib.Path) -> str:
    built = peers / "mistralrs"
    if built.exists():
        return f"{built} is there, but times itself only: run `mistralrs bench` by hand"
    return "not built (`setup.sh FOLDER mistralrs`; many minutes), not measured"


def speeds(found: dict, prompt: dict, new: int) -> tuple[float, float]:
    return len(prompt["ids"]) / found["prefill_seconds"], (new - 1) / found["decode_seconds"]


def same_start(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def measure(args, kind: str, model: pathlib.Path, gguf: pathlib.Path, prompt: dict, threads: int, isa: str) -> dict:
    """Rounds of pairs (ours, peer), `[prefill, decode]` tokens per second each."""
    mine, peers, absent = engines(args, kind, model, gguf, threads, isa)
    started = []
    try:
        for make in mine + peers:
            try:
                engine = make() if callable(make) else make
                engine.tokens = engine.ask(prompt, args.new)["tokens"]
                started.append(engine)
            except Failure as failure:
                absent.append(str(failure))
        mine = [e for e in started if e.name.startswith("ours")]
        if not mine:
            raise Failure("; ".join(absent))
        ours, others = mine[0], [e for e in started if e is not mine[0]]
        pairs = {e.name: [] for e in others}
        for turn in range(args.rounds):
            for other in others:
                pair = {}
                for engine in (ours, other) if turn % 2 == 0 else (other, ours):
                    # Threads of the engine before may still be spinning.
                    time.sleep(args.pause)
                    pair[engine.name] = speeds(engine.ask(prompt, args.new), prompt, args.new)
                pairs[other.name].append([pair[ours.name], pair[other.name]])
    finally:
        for engine in started:
            engine.close()
    report = {"model": kind, "isa": isa, "threads": threads, "rounds": args.rounds, "absent": absent, "pairs": pairs}
    report["engines"] = {e.name: {"engine": e.engine, "detail": e.detail, "tokens": e.tokens} for e in started}
    report["ours"] = ours.name
    return report


def verdict(ratio: float, bars: tuple[float, float] | None) -> str:
    if bars is None:
        return ""
    bar, stretch = bars
    if ratio < bar:
        return f"bar {bar} missed"
    return f"bar {bar} reached" + (f", stretch {stretch} reached" if ratio >= stretch > bar else "")


def show(report: dict, new: int) -> None:
    kind, isa, threads = report["model"], report["isa"], report["threads"]
    plural = "" if threads == 1 else "s"
    print(f"\n{kind}, instruction set {isa}, {threads} thread{plural}, {report['rounds']} rounds, tokens per second")
    all_ours = [pair[0] for pairs in report["pairs"].values() for pair in pairs]
    median = lambda values: statistics.median(values) if values else float("nan")
    lines = [(report["ours"], median([p for p, _ in all_ours]), median([d for _, d in all_ours]), None)]
    for name, pairs in report["pairs"].items():
        theirs = [median([pair[1][i] for pair in pairs]) for i in (0, 1)]
        lines.append((name, *theirs, [[a[i] / b[i] for a, b in pairs] for i in (0, 1)]))
    print(f"  {'':16} {'prefill':>8} {'ours over it':>22} {'decode':>8} {'ours over it':>22}")
    for name, prefill, decode, ratios in lines:
        text = [f"{median(r):.2f} ({min(r):.2f}..{max(r):.2f})" for r in ratios] if ratios else ["", ""]
        print(f"  {name:16} {prefill:8.0f} {text[0]:>22} {decode:8.1f} {text[1]:>22}")
    for name, _, _, ratios in lines:
        bars = BARS.get((kind, isa, name))
        if bars and ratios:
            for what, ratio, bar in zip(("prefill", "decode"), ratios, bars):
                print(f"  {what} over {name}: {median(ratio):.3f}, {verdict(median(ratio), bar)}")
    tokens = report["engines"][report["ours"]]["tokens"]
    for name, about in report["engines"].items():
        same = same_start(tokens, about["tokens"])
        if name == report["ours"]:
            agreement = ""
        elif same == new:
            agreement = f"; all {new} tokens are ours"
        else:
            agreement = f"; {same} tokens are ours, then {about['tokens'][same]} where ours has {tokens[same]}"
        print(f"  {name}: {about['engine']}, {about['detail']}{agreement}")
    for line in report["absent"]:
        print(f"  not measured: {line}")


def find_prompt(args) -> dict:
    python = args.peers / "torch" / "bin" / "python"
    command = [python, HERE / "engines.py", "prompt", args.model, args.prompt_tokens, *args.text]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"no prompt: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout)


def file_bytes(folder: pathlib.Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=pathlib.Path, help="MoE as a folder of safetensors")
    parser.add_argument("gguf", type=pathlib.Path, help="the same for llama.cpp")
    parser.add_argument("binary", type=pathlib.Path, help="moe-merge, a release build")
    parser.add_argument("--peers", type=pathlib.Path, required=True, help="folder that setup.sh made")
    parser.add_argument("--dense", type=pathlib.Path, help="dense model as a folder")
    parser.add_argument("--dense-gguf", type=pathlib.Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", nargs="+", default=["native"], choices=["native", "avx2"])
    parser.add_argument("--engines", nargs="+", default=["llama.cpp", "transformers", "candle"])
    parser.add_argument("--experts", default="grouped_mm", help="transformers' experts_implementation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds before each run")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", default=TEXTS, help="files that the prompt is cut from")
    parser.add_argument("--json", type=pathlib.Path, help="store the raw numbers here")
    args = parser.parse_args()
    if (args.dense is None) != (args.dense_gguf is None):
        parser.error("--dense and --dense-gguf go together")
    if args.new < 2 or args.rounds < 1:
        parser.error("--new is at least 2, --rounds at least 1")
    for path in filter(None, (args.model, args.gguf, args.binary, args.dense, args.dense_gguf, args.peers)):
        if not path.exists():
            parser.error(f"{path} is not there")
    args.binary, args.peers = args.binary.resolve(), args.peers.absolute()
    return args


def main() -> None:
    args = arguments()
    models = [("moe", args.model, args.gguf)]
    if args.dense:
        models.append(("dense", args.dense, args.dense_gguf))
    cores = os.cpu_count()
    print(f"{processor()}, {cores} cores; prompt of {args.prompt_tokens} tokens, {args.new} new ones, greedy")
    document = {"version": 1, "processor": processor(), "cores": cores, "runs": []}
    try:
        prompt = find_prompt(args)
        for isa in args.isa:
            for threads in args.threads:
                for kind, model, gguf in models:
                    report = measure(args, kind, model, gguf, prompt, threads, isa)
                    show(report, args.new)
                    document["runs"].append(report)
        memory = Command(args.binary, args.model, 1, {}).memory(1)
        document["memory"] = {**memory, "model_files": file_bytes(args.model)}
        above = memory["anonymous"] / 2**20
        print(
            f"\nmemory of load and one token: peak {memory['resident'] / 1e6:.0f} MB resident, of which at most {above:.1f} MiB"
            f" are no pages of the file of {document['memory']['model_files'] / 1e6:.0f} MB"
            f" (bar 64 MiB {'reached' if above <= 64 else 'missed'}, stretch 16 MiB {'reached' if above <= 16 else 'missed'})"
        )
    except Failure as failure:
        raise SystemExit(f"error: {failure}")
    finally:
        if args.json and document["runs"]:
            args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

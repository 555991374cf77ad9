"""One engine of runtime.py: loads a model, then answers requests on stdin, one JSON document per line.

usage: engines.py llama MODEL.gguf THREADS
       engines.py transformers MODEL_FOLDER THREADS EXPERTS_IMPLEMENTATION
       engines.py prompt MODEL_FOLDER TOKENS TEXT_FILE...

A request is `{"prompt": [ids], "new": N}`; the answer has `prefill_seconds` (the pass over the prompt and the choice of the
first token), `decode_seconds` (the `N - 1` passes after it) and `tokens`, chosen greedily. `prompt` prints a text that the
model's tokenizer turns into exactly TOKENS ids, cut from the files in turn, and the ids.
"""

import json
import sys
import time


def answer(value: dict) -> None:
    print(json.dumps(value), flush=True)


def serve(engine: str, detail: str, start, step) -> None:
    """Answers requests: `start()` forgets everything, `step(tokens)` gives the best token after them."""
    answer({"ready": True, "engine": engine, "detail": detail})
    for line in sys.stdin:
        request = json.loads(line)
        start()
        begun = time.perf_counter()
        tokens = [step(request["prompt"])]
        prefilled = time.perf_counter()
        while len(tokens) < request["new"]:
            tokens.append(step([tokens[-1]]))
        ended = time.perf_counter()
        answer({"prefill_seconds": prefilled - begun, "decode_seconds": ended - prefilled, "tokens": tokens})


def llama(path: str, threads: int) -> None:
    import ctypes

    import llama_cpp
    import numpy

    @llama_cpp.llama_log_callback
    def silent(level, text, data):
        pass

    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    settings = llama_cpp.llama_context_default_params()
    # One block of tokens for the whole prompt: the fastest way it has.
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, 1024, 1024
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"llama.cpp cannot run {path}")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def start() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    def step(tokens: list[int]) -> int:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise SystemExit(f"llama_decode: status {status}")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(numpy.ctypeslib.as_array(logits, shape=(vocab,)).argmax())

    info = llama_cpp.llama_print_system_info().decode()
    sets = [part.split("=")[0].split(":")[-1].strip() for part in info.split("|") if part.strip().endswith("= 1")]
    wanted = ("AVX2", "AVX512", "AVX512_BF16", "NEON", "LLAMAFILE", "OPENMP")
    detail = "built with " + ", ".join(s for s in sets if s in wanted)
    serve(f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", detail, start, step)


def transformers(path: str, threads: int, implementation: str) -> None:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    kinds = {} if implementation == "none" else {"experts_implementation": implementation}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **kinds).eval()
    cache = None

    def start() -> None:
        nonlocal cache
        cache = transformers.DynamicCache(config=model.config)

    def step(tokens: list[int]) -> int:
        ids = torch.tensor([tokens])
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    detail = f"torch {torch.__version__}, bf16, {onednn}, experts {implementation}"
    with torch.inference_mode():
        serve(f"transformers {transformers.__version__}", detail, start, step)


def prompt(folder: str, count: int, files: list[str]) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    # As moe-merge reads a prompt: with what the tokenizer puts before every text.
    encode = lambda text: tokenizer.encode(text, add_special_tokens=True).ids
    texts = []
    for name in files:
        with open(name, encoding="utf-8") as f:
            texts.append(f.read())
    text = ""
    for done, piece in enumerate(texts, 1):
        goal = count * done // len(texts)
        words = piece.split(" ")
        taken = 0
        while taken < len(words) and len(encode(text + " ".join(words[: taken + 1]))) <= goal:
            taken += 1
        text += " ".join(words[:taken]) + ("\n" if done < len(texts) else "")
    # Numbers are spelled digit by digit: they fill the rest to the token.
    for filler in (" 1", "2", "3", "4", "5", "6", "7", "8", "9") * count:
        if len(encode(text)) >= count:
            break
        text += filler if len(encode(text + filler)) <= count else ""
    ids = encode(text)
    if len(ids) != count:
        raise SystemExit(f"the texts give {len(ids)} tokens, not {count}: name longer ones")
    answer({"text": text, "ids": ids})


def main() -> None:
    kind, *rest = sys.argv[1:] or [""]
    if kind == "llama" and len(rest) == 2:
        llama(rest[0], int(rest[1]))
    elif kind == "transformers" and len(rest) == 3:
        transformers(rest[0], int(rest[1]), rest[2])
    elif kind == "prompt" and len(rest) >= 3:
        prompt(rest[0], int(rest[1]), rest[2:])
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()

"""Load GGUF files that moe-merge wrote with llama.cpp, as anybody would, and compare.

usage: check_gguf.py CASES.json

CASES.json is a list of
    name      shown in the report
    file      what `moe-merge export` wrote
    logits    what `moe-merge logits MODEL --tokens TOKENS --out LOGITS` wrote for the same model
    tokens    the same tokens
    bound     largest difference allowed, as a share of the largest logit
    others    share of the tokens that may differ more (optional): those whose experts nearly tie and change by rounding
    texts     texts with their token ids, as {"text", "tokens"} (optional)
    greedy    token ids of a greedy continuation, as {"prompt", "continuation"} (optional)

The cache of keys and values is kept in f32, as ours is. Prints one line of JSON for each case and exits with 1 if any has a
complaint. Needs llama-cpp-python.
"""

import ctypes
import json
import pathlib
import sys

import llama_cpp as lib
import numpy


def tensor(path, name):
    """An f32 tensor of a safetensors file."""
    data = pathlib.Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    start, end = entry["data_offsets"]
    return numpy.frombuffer(data[8 + length + start : 8 + length + end], "<f4").reshape(entry["shape"])


class Model:
    def __init__(self, path, context):
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp does not load the file")
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = lib.GGML_TYPE_F32
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = lib.llama_init_from_model(self.model, params)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocab)
        self.at = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)

    def clear(self):
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        self.at = 0

    def forward(self, tokens):
        """Logits of all of these tokens, which follow those given before."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.at + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        failed = lib.llama_decode(self.context, batch)
        lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode gives {failed}")
        self.at += len(tokens)
        logits = lib.llama_get_logits(self.context)
        return numpy.ctypeslib.as_array(logits, shape=(len(tokens), self.size)).copy()

    def tokenize(self, text):
        data = text.encode()
        room = (lib.llama_token * (len(data) + 8))()
        count = lib.llama_tokenize(self.vocab, data, len(data), room, len(room), True, True)
        return list(room[:count])


def check(case):
    complaints = []
    expected = tensor(case["logits"], "logits")
    greedy = case.get("greedy", {"prompt": [], "continuation": []})
    longest = max(len(case["tokens"]), len(greedy["prompt"]) + len(greedy["continuation"]))
    with Model(case["file"], longest + 8) as model:
        logits = model.forward(case["tokens"])
        if logits.shape != expected.shape:
            return {"name": case["name"], "difference": None, "complaints": [f"logits {logits.shape}"]}
        by_token = numpy.abs(logits - expected).max(axis=1) / numpy.abs(expected).max()
        difference = float(by_token.max())
        beyond = int((~(by_token <= case["bound"])).sum())
        if beyond > case.get("others", 0) * len(by_token):
            complaints.append(f"logits of {beyond} tokens differ by up to {difference:.2e}, more than {case['bound']:.0e}")
        for entry in case.get("texts", []):
            if (found := model.tokenize(entry["text"])) != entry["tokens"]:
                complaints.append(f"tokens of {entry['text']!r}: {found} instead of {entry['tokens']}")
        if greedy["continuation"]:
            model.clear()
            found, step = [], greedy["prompt"]
            for _ in greedy["continuation"]:
                step = [int(model.forward(step)[-1].argmax())]
                found += step
            if found != greedy["continuation"]:
                complaints.append(f"greedy text: {found} instead of {greedy['continuation']}")
    return {"name": case["name"], "difference": difference, "complaints": complaints}


def main() -> int:
    # llama.cpp tells about every tensor otherwise.
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    failed = False
    for case in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        try:
            report = check(case)
        except Exception as e:  # one file that does not load must not hide the others
            report = {"name": case["name"], "difference": None, "complaints": [f"{type(e).__name__}: {e}"]}
        failed |= bool(report["complaints"])
        print(json.dumps(report | {"llama_cpp": lib.__version__}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

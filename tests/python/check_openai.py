"""Asks a server through the official client: check_openai.py ADDRESS MODEL. Prints one line of JSON with what it got."""

import json
import sys

import openai

address, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).owned_by == "moe-merge"

greedy = {"model": model, "max_tokens": 20, "temperature": 0}
whole = client.completions.create(prompt="The river", **greedy)
stream = client.completions.create(prompt="The river", stream=True, stream_options={"include_usage": True}, **greedy)
chunks = list(stream)
assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 20
assert whole.system_fingerprint.startswith("fp_g")

messages = [{"role": "system", "content": "Tell."}, {"role": "user", "content": "The river"}]
chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, n=2, **greedy)
assert len(chat.choices) == 2 and len(chat.choices[0].logprobs.content[0].top_logprobs) == 3
pieces = {0: "", 1: ""}
for chunk in client.chat.completions.create(messages=messages, stream=True, n=2, **greedy):
    for choice in chunk.choices:
        pieces[choice.index] += choice.delta.content or ""
assert [pieces[0], pieces[1]] == [c.message.content for c in chat.choices]
assert chat.choices[0].finish_reason == "length"
with client.chat.completions.stream(messages=messages, model=model, max_completion_tokens=20, temperature=0) as events:
    assert "".join(e.delta for e in events if e.type == "content.delta") == pieces[0]

raw = client.completions.with_raw_response.create(prompt="The river", **greedy)
assert raw.headers["x-moe-merge-generation"] == "0" and raw.parse() is not None


def fails(kind, code, **change):
    try:
        client.completions.create(**{"prompt": "a", **greedy, **change})
    except kind as error:
        assert error.code == code, error
    else:
        raise AssertionError(f"{change} was accepted")


fails(openai.NotFoundError, "model_not_found", model="gpt-4")
fails(openai.BadRequestError, "decimal_above_max_value", temperature=9)
fails(openai.BadRequestError, "context_length_exceeded", prompt="river " * 1000)
print(json.dumps({"text": whole.choices[0].text, "openai": openai.__version__}))

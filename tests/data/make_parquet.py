"""Parquet files as datasets on the Hub have them, with the same rows as lines of JSON beside each.

usage: make_parquet.py OUT_FOLDER      (pyarrow 26.0.1)

chats.parquet    zstd, row groups of 5, `messages` as a list of structs with more fields than role and content
exchanges.parquet  gzip, `prompt` and `completion`, among columns of other types
texts.parquet    Snappy, dictionary and data page v2, `text` as large_string, with null and empty ones
"""

import datetime
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq

WHAT = ["flour", "onions", "butter", "plums", "barley", "cream", "mushrooms", "ginger", "lentils", "pepper"]
HOW = ["gently", "for 20 minutes", "until golden", "over low heat", "twice"]


def sentence(i: int) -> str:
    a, b = WHAT[i % 10], WHAT[(7 * i + 3) % 10]
    return f"Stir two cups of {a} into the {b}, then rest it {HOW[i % 5]}.\n"


def write(name: str, table: pa.Table, keys: list[str], **how) -> None:
    pq.write_table(table, name + ".parquet", **how)
    with open(name + ".jsonl", "w") as out:
        for row in table.to_pylist():
            out.write(json.dumps({k: row[k] for k in keys}) + "\n")


def main() -> None:
    os.chdir(sys.argv[1])
    part = pa.struct([("content", pa.string()), ("role", pa.string()), ("weight", pa.int64())])
    chats = [
        [
            {"role": "user", "content": f"What about {WHAT[i % 10]}?", "weight": None},
            {"role": "assistant", "content": sentence(i), "weight": 1},
        ]
        + ([{"role": "user", "content": "And then?"}, {"role": "assistant", "content": sentence(i + 5)}] * (i % 2))
        for i in range(12)
    ]
    # Of these rows, 13 and 14 are no conversations.
    chats += [None, []]
    table = pa.table({"id": pa.array(range(14)), "messages": pa.array(chats, pa.list_(part))})
    write("chats", table, ["messages"], compression="zstd", row_group_size=5)

    when = [datetime.datetime(2020, 1, 1 + i) for i in range(12)]
    table = pa.table({
        "when": pa.array(when, pa.timestamp("ns")),
        "prompt": [f"Task {i}: " for i in range(12)],
        "scores": pa.array([[0.5] * i for i in range(12)], pa.list_(pa.float16())),
        "completion": pa.array([sentence(i) * 2 for i in range(11)] + [None]),
    })
    write("exchanges", table, ["prompt", "completion"], compression="gzip", row_group_size=12)

    texts = pa.array([sentence(i % 6) * 3 for i in range(16)] + ["", None], pa.large_string())
    how = {"compression": "snappy", "data_page_version": "2.0", "data_page_size": 200}
    write("texts", pa.table({"text": texts}), ["text"], row_group_size=9, **how)


if __name__ == "__main__":
    main()

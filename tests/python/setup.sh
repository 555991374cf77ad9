#!/bin/sh
# Makes the Python environments that `cargo test --test load_transformers`, `--test load_llama_cpp` and `--test serve` ask for, about 2 GB:
#
#     tests/python/setup.sh ~/moe-merge-python
#     export MOE_MERGE_PYTHON=~/moe-merge-python/v5/bin/python MOE_MERGE_PYTHON_4=~/moe-merge-python/v4/bin/python
#     export MOE_MERGE_PYTHON_OPENAI=~/moe-merge-python/openai/bin/python
#     export MOE_MERGE_LLAMA_CPP=~/moe-merge-python/llama/bin/python
#
# llama-cpp-python is built from source: that takes a C++ compiler and some minutes.
set -eu
root=${1:?usage: setup.sh FOLDER}
for version in 5 4.57; do
    folder="$root/v${version%%.*}"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch "transformers==$version.*" peft safetensors numpy jinja2
done
python3 -m venv "$root/openai"
"$root/openai/bin/pip" install --quiet openai playwright
python3 -m venv "$root/llama"
"$root/llama/bin/pip" install --quiet llama-cpp-python numpy

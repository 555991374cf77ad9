#!/bin/sh
# Sets up the engines that runtime.py compares with.
#
# usage: setup.sh FOLDER [llama] [llama-avx2] [torch] [candle] [mistralrs]
#
# Without names: all but mistralrs, whose build takes many minutes. What is there already is left as it is. Needs
# Python 3.10 or newer, cmake, a C++ compiler and Rust. Afterwards FOLDER has
#   llama/ llama-avx2/   venvs with llama-cpp-python, built for this machine, and for AVX2 only
#   torch/               a venv with torch (CPU), transformers, and what llama.cpp's converter imports
#   converter/           llama.cpp's convert_hf_to_gguf.py
#   candle-mixtral       candle_mixtral/ of this folder
#   mistralrs            mistral.rs, if asked for
# PYTHON names the interpreter, LLAMA_CPP a file to install llama-cpp-python from, TORCH_INDEX an index of torch wheels.
set -eu

[ $# -ge 1 ] || { sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
[ $# -ge 1 ] || set -- llama llama-avx2 torch candle
python=${PYTHON:-python3}
llama_cpp=${LLAMA_CPP:-llama-cpp-python==0.3.36}

# VENV CMAKE_ARGS: without the multimodal library, which text does not need.
llama() {
    [ -x "$folder/$1/bin/python" ] || "$python" -m venv "$folder/$1"
    "$folder/$1/bin/python" -c 'import llama_cpp' 2>/dev/null && return
    # Not from the cache: it would give the wheel that was built with other arguments.
    CMAKE_ARGS="-DLLAVA_BUILD=OFF $2" "$folder/$1/bin/pip" install --no-cache-dir --no-binary llama-cpp-python "$llama_cpp"
}

torch() {
    [ -x "$folder/torch/bin/python" ] || "$python" -m venv "$folder/torch"
    "$folder/torch/bin/python" -c 'import torch, transformers, gguf' 2>/dev/null ||
        "$folder/torch/bin/pip" install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
            torch==2.9.1 transformers==5.23.0 gguf sentencepiece safetensors numpy
    [ -e "$folder/converter/convert_hf_to_gguf.py" ] && return
    # The converter is not in the wheel, only in the source package.
    mkdir -p "$folder/source"
    case $llama_cpp in
        *.tar.gz) cp "$llama_cpp" "$folder/source/" ;;
        *) "$folder/torch/bin/pip" download --no-deps --no-binary llama-cpp-python --dest "$folder/source" "$llama_cpp" ;;
    esac
    tar -xzf "$folder"/source/llama_cpp_python-*.tar.gz -C "$folder/source"
    ln -sfn "$(echo "$folder"/source/llama_cpp_python-*/vendor/llama.cpp)" "$folder/converter"
}

# Compiled for this machine, as its users are told to do.
candle() {
    [ -x "$folder/candle-mixtral" ] && return
    RUSTFLAGS="-C target-cpu=native" cargo build --release --manifest-path "$here/candle_mixtral/Cargo.toml" \
        --target-dir "$folder/candle-target"
    cp "$folder/candle-target/release/candle-mixtral" "$folder/candle-mixtral"
}

mistralrs() {
    [ -x "$folder/mistralrs" ] && return
    RUSTFLAGS="-C target-cpu=native" cargo install --root "$folder/mistralrs-root" mistralrs-cli
    cp "$folder/mistralrs-root/bin/mistralrs" "$folder/mistralrs"
}

for name in "$@"; do
    case $name in
        llama) llama llama "-DGGML_NATIVE=ON" ;;
        llama-avx2) llama llama-avx2 "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" ;;
        torch | candle | mistralrs) "$name" ;;
        *) echo "setup.sh: \`$name\` is none of llama, llama-avx2, torch, candle, mistralrs" >&2; exit 2 ;;
    esac
done

"""Writes moe.ptx from moe.cu with NVRTC 12.0 for compute_80: PTX 8.0, which every driver from 525 on loads.

    python -m pip install nvidia-cuda-nvrtc-cu12==12.0.140 nvidia-cuda-nvcc-cu12==12.0.140
    python kernels/cuda/build_ptx.py            # writes moe.ptx
    python kernels/cuda/build_ptx.py --check    # compiles again, compares, assembles for sm_80 and sm_90, prints spills

The second package is for --check only (ptxas). Do not use a newer compiler: its PTX is refused by older drivers.
"""

import ctypes
import glob
import os
import re
import subprocess
import sys
import sysconfig
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
OPTIONS = [b"--gpu-architecture=compute_80", b"--std=c++17", b"--fmad=true"]


def package(pattern):
    for root in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        found = sorted(glob.glob(os.path.join(root, "nvidia", pattern)))
        if found:
            return found[0]
    sys.exit(f"missing: nvidia/{pattern}; see the packages named in {__file__}")


def compile_ptx(source):
    nvrtc = ctypes.CDLL(package("cuda_nvrtc/lib/libnvrtc.so.12"))
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if (major.value, minor.value) != (12, 0):
        sys.exit(f"NVRTC is {major.value}.{minor.value}, expected 12.0")
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"moe.cu", 0, None, None):
        sys.exit("nvrtcCreateProgram failed")
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if log.value.strip():
        print(log.value.decode(), file=sys.stderr)
    if failed:
        sys.exit("moe.cu does not compile")
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    return ptx.value.decode()


def fnv1a64(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def with_header(ptx, source):
    header = (
        "// Made from moe.cu by build_ptx.py; do not edit.\n"
        f"// fnv1a64 of moe.cu: {fnv1a64(source):016x}\n"
    )
    return header + ptx.rstrip() + "\n"


def assemble(ptx_path):
    """Registers, spills and shared memory of every kernel, as ptxas tells them."""
    ptxas = package("cuda_nvcc/bin/ptxas")
    worst = 0
    for arch in ("sm_80", "sm_90"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = os.path.join(folder, "moe.cubin")
            done = subprocess.run(
                [ptxas, "-v", f"-arch={arch}", ptx_path, "-o", cubin], capture_output=True, text=True
            )
        told = done.stdout + done.stderr
        if done.returncode:
            sys.exit(told)
        name = None
        for line in told.splitlines():
            if found := re.search(r"entry function '(\w+)'", line):
                name = found[1]
            if found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                spills = int(found[1]) + int(found[2])
                worst = max(worst, spills)
            if found := re.search(r"Used (\d+) registers.*?(?:, (\d+) bytes smem)?(?:,|$)", line):
                shared = re.search(r"(\d+) bytes smem", line)
                print(f"{arch} {name} registers {found[1]} shared {shared[1] if shared else 0} spills {spills}")
    return worst


def main():
    with open(os.path.join(HERE, "moe.cu"), "rb") as f:
        source = f.read()
    text = with_header(compile_ptx(source), source)
    path = os.path.join(HERE, "moe.ptx")
    if "--check" not in sys.argv:
        with open(path, "w") as f:
            f.write(text)
        return
    with open(path) as f:
        if f.read() != text:
            sys.exit("moe.ptx is not what moe.cu gives: run build_ptx.py")
    worst = assemble(path)
    print(f"spills: {worst} bytes")
    sys.exit(1 if worst else 0)


if __name__ == "__main__":
    main()

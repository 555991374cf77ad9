"""Makes q8_0.safetensors: numbers, and the Q8_0 bytes that gguf-py (0.19) gives for them.

usage: make_q8_0.py
"""

import pathlib

import gguf
import numpy
from safetensors.numpy import save_file

random = numpy.random.default_rng(7)
rows = [random.standard_normal(64) * 10.0**exponent for exponent in range(-6, 5)]
rows.append(numpy.zeros(64))
rows.append(numpy.full(64, 3e-9))  # the scale is a subnormal f16, or zero
rows.append(numpy.arange(-32, 32) + 0.5)  # halves, once multiplied by the scale of 127
rows.append(numpy.concatenate([numpy.arange(32) * 4.0, -numpy.arange(32) * 4.0 - 3.0]))
rows.append(numpy.concatenate([[127.0], numpy.arange(31) - 15.5, [-127.0], numpy.arange(31) - 15.5]))  # exact halves
values = numpy.array(rows, dtype=numpy.float32)
blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
save_file({"values": values, "blocks": blocks}, pathlib.Path(__file__).parent / "q8_0.safetensors")

"""Blocks of ggml's tensor types that hold a quantizer's codes exactly.

A block is a run of 32, 128 or 256 weights with its own fp16 scale `d`, which repeats the scale of its row or
group. ggml's own quantizers would fit new scales and change most values; here codes go where ggml's
dequantizers find them. K-types also have small integer scales per 16 or 32 weights: these are 1, and their
minimum, in units of half a scale, places the half-integer grids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stableqat.export.gguf_header import Header
from stableqat.quantizers import QuantizedWeight

Array = np.ndarray
Target = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Encoding:
    """A ggml type that holds some grids exactly.

    Attributes:
        type: Name of the ggml type.
        block: Weights that share `d`; must divide rows and groups.
        fits: Whether it holds a weight's grid.
        blocks: Makes the bytes of blocks, `(blocks, bytes)`, from codes `(blocks, block)` and scales
            `(blocks, 1)`.
        integers: Whether it holds half-integer grids as odd integers.
        gpu: Whether llama.cpp has kernels for it on every kind of GPU.
    """

    type: str
    block: int
    fits: Callable[[QuantizedWeight], bool]
    blocks: Callable[[Array, Array], Array]
    integers: bool = False
    gpu: bool = True

    def holds(self, weight: QuantizedWeight) -> bool:
        """Whether it holds a weight's grid, and its rows and groups in whole blocks."""
        return self.fits(weight) and weight.group_size % self.block == 0

    def pack(self, weight: QuantizedWeight) -> Array:
        """Return the bytes of a weight, `(out, bytes per row)`."""
        weight = weight.integers() if self.integers else weight
        rows, inputs = weight.codes.shape
        codes = weight.codes.numpy().reshape(-1, self.block)
        scales = weight.scale_of_blocks(self.block).numpy().reshape(-1, 1)
        assert codes.size == rows * inputs
        return np.ascontiguousarray(self.blocks(codes, scales).reshape(rows, -1))


def encodings(weight: QuantizedWeight, target: Target) -> list[Encoding]:
    """Return the types for a target that hold a weight exactly, the smallest first."""
    return [each for each in ENCODINGS if (each.gpu or target == "cpu") and each.holds(weight)]


def size(weight: QuantizedWeight, target: Target) -> int:
    """Return the bytes that a weight takes."""
    import gguf

    kind = gguf.GGMLQuantizationType[encodings(weight, target)[0].type]
    block, taken = gguf.GGML_QUANT_SIZES[kind]
    return weight.codes.numel() // block * taken


def dequantize(file: Header, name: str) -> Array:
    """Return the values of a tensor of a file in float32, `(..., weights per row)`.

    Args:
        file: The file's header.
        name: The tensor's name.
    """
    import gguf

    data, kind = file.bytes_of(name), gguf.GGMLQuantizationType(file.tensors[name].type)
    if kind.name != "Q1_0":
        return np.array(gguf.dequantize(data, kind))
    blocks = np.array(data).reshape(-1, 18)  # gguf has no reader for this type
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
    return (blocks[:, :2].copy().view(np.float16) * signs).reshape(*data.shape[:-1], -1)


def _half(scale: Array) -> Array:
    return scale.astype(np.float16).view(np.uint8)


def _fields(values: Array, bits: int, run: int) -> Array:
    """Pack unsigned values into bytes, each further `run` of values into the next higher bits."""
    parts = values.astype(np.uint8).reshape(len(values), -1, 8 // bits, run)
    shifts = (np.arange(8 // bits, dtype=np.uint8) * bits).reshape(1, 1, -1, 1)
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(values), -1)


def _constant(count: int, *values: int) -> Array:
    return np.tile(np.array(values, dtype=np.uint8), (count, 1))


def _tq2_0(codes: Array, scale: Array) -> Array:
    """`d * (u - 1)`."""
    return np.hstack([_fields(codes + 1, 2, 32), _half(scale)])


def _tq2_0_negated(codes: Array, scale: Array) -> Array:
    """The same with `d = -s`, so that u = 3 is the code -2."""
    return np.hstack([_fields(1 - codes, 2, 32), _half(-scale)])


def _q1_0(codes: Array, scale: Array) -> Array:
    """`d` or `-d`, d half of the scale."""
    return np.hstack([_half(scale / 2), np.packbits(codes + 1, axis=1, bitorder="little")])


def _q2_k_integer(codes: Array, scale: Array) -> Array:
    """`d * u - dmin * 2`, dmin equal to d."""
    scales = _constant(len(codes), *[1 | 2 << 4] * 16)
    return np.hstack([scales, _fields(codes + 2, 2, 32), _half(scale), _half(scale)])


def _q2_k(codes: Array, scale: Array) -> Array:
    """`d * u - dmin * 3`, dmin half of d."""
    scales = _constant(len(codes), *[1 | 3 << 4] * 16)
    return np.hstack([scales, _fields(codes + 2, 2, 32), _half(scale), _half(scale / 2)])


def _q3_k(codes: Array, scale: Array) -> Array:
    """`d * (33 - 32) * (u - 4)`, the third bits apart, sixteen six-bit scales in twelve bytes."""
    codes = codes + 4
    scales = _constant(len(codes), *[0x11] * 8, *[0xAA] * 4)
    return np.hstack([_fields(codes >> 2, 1, 32), _fields(codes & 3, 2, 32), scales, _half(scale)])


def _q4_k(codes: Array, scale: Array) -> Array:
    """`d * u - dmin * 15`, dmin half of d."""
    scales = _constant(len(codes), *[1] * 4, *[15] * 4, *[1 | 15 << 4] * 4)
    return np.hstack([_half(scale), _half(scale / 2), scales, _fields(codes + 8, 4, 32)])


def _q4_0(codes: Array, scale: Array) -> Array:
    """`d * (u - 8)`."""
    return np.hstack([_half(scale), _fields(codes + 8, 4, 16)])


def _q5_0(codes: Array, scale: Array) -> Array:
    """`d * (u - 16)`, the fifth bits apart."""
    codes = codes + 16
    fifth = np.packbits((codes >> 4).astype(np.uint8), axis=1, bitorder="little")
    return np.hstack([_half(scale), fifth, _fields(codes & 15, 4, 16)])


def _q8_0(codes: Array, scale: Array) -> Array:
    """`d * q`."""
    return np.hstack([_half(scale), codes.view(np.uint8)])


def _is(grid: str, bits: int) -> Callable[[QuantizedWeight], bool]:
    return lambda weight: (weight.grid, weight.bits) == (grid, bits)


def _up_to(bits: int) -> Callable[[QuantizedWeight], bool]:
    return lambda weight: weight.bits + (weight.zero_point != 0) <= bits


ENCODINGS = (  # smallest first
    Encoding("Q1_0", 128, _is("binary", 1), _q1_0),
    Encoding("TQ2_0", 256, _is("ternary", 2), _tq2_0, gpu=False),
    Encoding("TQ2_0", 256, _is("integer", 2), _tq2_0_negated, gpu=False),
    Encoding("Q2_K", 256, _is("ternary", 2), _q2_k_integer),
    Encoding("Q2_K", 256, _is("integer", 2), _q2_k_integer),
    Encoding("Q2_K", 256, _is("stretched", 2), _q2_k),
    Encoding("Q3_K", 256, _is("integer", 3), _q3_k),
    Encoding("Q4_K", 256, _is("stretched", 4), _q4_k),
    Encoding("Q4_0", 32, _up_to(4), _q4_0, integers=True),
    Encoding("Q5_0", 32, _up_to(5), _q5_0, integers=True),
    Encoding("Q8_0", 32, _up_to(8), _q8_0, integers=True),
)

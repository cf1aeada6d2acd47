"""Mathematics of fake quantization: grids, surrogates, initial scales, forward and backward."""

from stableqat.ops.cross_entropy import IGNORED, fused_cross_entropy
from stableqat.ops.dispatch import implementation
from stableqat.ops.fake_quantize import (
    compute_dtype,
    dequantize_codes,
    fake_quantize,
    fake_quantize_many,
    pull_back,
    quantize_codes,
)
from stableqat.ops.grids import Grid, GridName, Mask, make_grid
from stableqat.ops.input_init import (
    BINS,
    count_values,
    counted_values,
    least_scale,
    least_scale_and_offset,
)
from stableqat.ops.inputs import Activation, InputOperands, quantize_input
from stableqat.ops.operands import TOGETHER, Operands
from stableqat.ops.product import product
from stableqat.ops.reference import acting_scale
from stableqat.ops.scale_init import ScaleInit, initial_scale
from stableqat.ops.surrogates import Constant, Fourier, Identity, KernelForm, Permuted, Surrogate, Tanh
from stableqat.ops.wire import Wire, decode, encode

__all__ = [
    "BINS",
    "IGNORED",
    "TOGETHER",
    "Activation",
    "Constant",
    "Fourier",
    "Grid",
    "GridName",
    "Identity",
    "InputOperands",
    "KernelForm",
    "Mask",
    "Operands",
    "Permuted",
    "ScaleInit",
    "Surrogate",
    "Tanh",
    "Wire",
    "acting_scale",
    "compute_dtype",
    "count_values",
    "counted_values",
    "decode",
    "dequantize_codes",
    "encode",
    "fake_quantize",
    "fake_quantize_many",
    "fused_cross_entropy",
    "implementation",
    "initial_scale",
    "least_scale",
    "least_scale_and_offset",
    "make_grid",
    "product",
    "pull_back",
    "quantize_codes",
    "quantize_input",
]

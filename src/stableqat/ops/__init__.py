"""Mathematics of fake quantization: grids, surrogates, initial scales, forward and backward."""

from stableqat.ops.cross_entropy import IGNORED, fused_cross_entropy
from stableqat.ops.dispatch import implementation
from stableqat.ops.fake_quantize import (
    compute_dtype,
    dequantize_codes,
    fake_quantize,
    fake_quantize_many,
    quantize_codes,
)
from stableqat.ops.grids import Grid, GridName, Mask, make_grid
from stableqat.ops.operands import TOGETHER, Operands
from stableqat.ops.product import product
from stableqat.ops.reference import acting_scale
from stableqat.ops.scale_init import ScaleInit, initial_scale
from stableqat.ops.surrogates import Constant, Fourier, Identity, KernelForm, Permuted, Surrogate, Tanh

__all__ = [
    "IGNORED",
    "TOGETHER",
    "Constant",
    "Fourier",
    "Grid",
    "GridName",
    "Identity",
    "KernelForm",
    "Mask",
    "Operands",
    "Permuted",
    "ScaleInit",
    "Surrogate",
    "Tanh",
    "acting_scale",
    "compute_dtype",
    "dequantize_codes",
    "fake_quantize",
    "fake_quantize_many",
    "fused_cross_entropy",
    "implementation",
    "initial_scale",
    "make_grid",
    "product",
    "quantize_codes",
]

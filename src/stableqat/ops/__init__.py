"""Mathematics of fake quantization: grids, surrogates, initial scales, forward and backward."""

from stableqat.ops.fake_quantize import dequantize_codes, fake_quantize, floor_scale, quantize_codes
from stableqat.ops.grids import Grid, GridName, Mask, make_grid
from stableqat.ops.scale_init import ScaleInit, initial_scale
from stableqat.ops.surrogates import Constant, Fourier, Identity, Permuted, Surrogate, Tanh

__all__ = [
    "Constant",
    "Fourier",
    "Grid",
    "GridName",
    "Identity",
    "Mask",
    "Permuted",
    "ScaleInit",
    "Surrogate",
    "Tanh",
    "dequantize_codes",
    "fake_quantize",
    "floor_scale",
    "initial_scale",
    "make_grid",
    "quantize_codes",
]

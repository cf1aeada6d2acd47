"""Quantization-aware training methods, one file each, behind the `Quantizer` interface."""

from stableqat.quantizers.base import Quantizer, QuantizerFactory, QuantizerSpec
from stableqat.quantizers.controls import PermutedStableQAT, ScaledSTE
from stableqat.quantizers.dsq import DSQ
from stableqat.quantizers.lrqat import LRQAT
from stableqat.quantizers.paretoq import ParetoQ
from stableqat.quantizers.places import STEAtNoise, STEAtRandomRounding, STEAtWeight
from stableqat.quantizers.quantized_weight import QuantizedWeight
from stableqat.quantizers.stableqat import StableQAT
from stableqat.quantizers.ste import STE

__all__ = [
    "DSQ",
    "LRQAT",
    "STE",
    "ParetoQ",
    "PermutedStableQAT",
    "QuantizedWeight",
    "Quantizer",
    "QuantizerFactory",
    "QuantizerSpec",
    "STEAtNoise",
    "STEAtRandomRounding",
    "STEAtWeight",
    "ScaledSTE",
    "StableQAT",
]

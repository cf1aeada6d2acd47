"""StableQAT: quantization-aware training of LLMs and ViTs at 1-4 bits.

Importing the package loads nothing heavy; its public names are imported when they are first used.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "PrepareQAT": "stableqat.callbacks",
    "QuantLinear": "stableqat.layers.linear",
    "calibrate": "stableqat.api",
    "convert": "stableqat.api",
    "follow": "stableqat.clock",
    "hold_weights": "stableqat.layers.hold",
    "parameter_groups": "stableqat.parameters",
    "prepare": "stableqat.api",
    "quantize_linears": "stableqat.surgery",
    "release_weights": "stableqat.layers.hold",
    "UserError": "stableqat.errors",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

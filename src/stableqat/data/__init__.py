"""The data that models train on: text packed into rows, and images with their labels.

Both LightningDataModules serve an embedded default set, local files and data sets of the Hub through one
order of samples that depends on the seed and the position alone, never on the number of processes or workers.
They are imported on first use, so that the help of `stableqat data` answers at once.
"""

from importlib import import_module
from typing import Any

_HOME = {"ImageDataModule": "stableqat.data.image", "TextDataModule": "stableqat.data.text"}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A model folder as transformers writes it, read file by file: tensors and plain values, nothing executed."""

import json
import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stableqat.errors import UserError
from stableqat.modules.architecture import pretrained_config, resolve_config

logger = logging.getLogger(__name__)

_FILES = ("model.safetensors", "pytorch_model.bin")
_EXTRAS = ("w_bits", "sine_soft_q", "efficient")  # settings of the released layers
_RENAMED = ("rope_scaling", "rope_theta", "torch_dtype")  # by transformers 5, which reads them all the same


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The architecture of a folder, and what the released codes add to its config.json.

    Args:
        folder: Model folder.

    Raises:
        UserError: If it is none.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"checkpoint: {folder} has no config.json; name the folder that the code saved")
    config = pretrained_config("checkpoint", str(folder))
    known = type(config)().to_dict()
    keys = {k: v for k, v in config.to_dict().items() if k in known}
    resolve_config(keys, None)  # refuses what is no language model of ours
    named = json.loads((folder / "config.json").read_text())
    if strange := sorted(named.keys() - known.keys() - {*_EXTRAS, *_RENAMED, *config.attribute_map}):
        logger.warning("%s: keys that its architecture does not have are left out: %s", folder, strange)
    return keys, {k: named[k] for k in _EXTRAS if k in named}


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder.

    Args:
        folder: Model folder; its weights may be in one file or in several with an index.

    Raises:
        UserError: If a file is missing, damaged, or holds more than tensors.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return _read(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            state: dict[str, Tensor] = {}
            for part in _parts(index):
                state |= _read(part)
            return state
    raise UserError(f"checkpoint: {folder} has neither {' nor '.join(_FILES)}")


def _parts(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of weight files; get the file again") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except UnpicklingError as error:
        raise UserError(f"{path}: holds more than tensors and plain values; refused") from error
    except (SafetensorError, RuntimeError, EOFError, BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path}: missing, cut short or damaged; get the file again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict")
    return state

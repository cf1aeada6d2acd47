"""Reads a model folder as transformers writes it: tensors and plain values, of which nothing is executed."""

import json
import logging
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stableqat.errors import UserError, one_line
from stableqat.modules.config import pretrained_config, resolve_config

logger = logging.getLogger(__name__)

_FILES = ("model.safetensors", "pytorch_model.bin")
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXTRAS = ("w_bits", "sine_soft_q", "efficient")  # settings of the released layers
_RENAMED = ("rope_scaling", "rope_theta", "torch_dtype")  # by transformers 5, which reads them all the same


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the architecture of a folder, and what the released codes add to its config.json.

    Args:
        folder: Model folder, with a config.json.

    Returns:
        The keys of the architecture, and those of the released codes.

    Raises:
        UserError: If the file does not describe a language model of this suite.
    """
    named = _mapping(folder / "config.json")
    try:
        config = pretrained_config("checkpoint", str(folder))
        known = type(config)().to_dict()
        keys = {k: v for k, v in config.to_dict().items() if k in known}
        resolve_config(keys, None)  # refuses any other model
    except UserError as error:
        said = str(error).removeprefix("checkpoint: ").removeprefix(f"{folder}: ")
        raise UserError(f"{folder}/config.json: {said.removeprefix('model.config.')}") from error
    except Exception as error:  # transformers checks keys with several types of its own
        raise UserError(f"{folder}/config.json: does not describe a model: {one_line(error)}") from error
    if strange := sorted(named.keys() - known.keys() - {*_EXTRAS, *_RENAMED, *config.attribute_map}):
        logger.warning("%s: ignores keys that its architecture does not have: %s", folder, strange)
    return keys, {k: named[k] for k in _EXTRAS if k in named}


def check_sizes(config: dict[str, Any], state: dict[str, Tensor], source: str) -> None:
    """Compare the sizes in config.json with the tensors, before anything of these sizes is allocated.

    Args:
        config: Architecture.
        state: Tensors of the checkpoint.
        source: The checkpoint, for messages.

    Raises:
        UserError: Naming the key.
    """
    names = ("embed_tokens", "layers.0.mlp.up_proj", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj")
    shapes: list[tuple[int, ...]] = []
    for name in names:
        key = f"model.{name}.weight"
        if key not in state or state[key].ndim != 2:
            raise UserError(f"{source}: {key} is missing or not a matrix; get the checkpoint again")
        shapes.append(tuple(state[key].shape))
    (vocabulary, hidden), (intermediate, _), (queries, _), (keys, _) = shapes
    layers = {match[1] for name in state if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    width = config.get("head_dim") or 0
    for key, said, found in (
        ("num_hidden_layers", config["num_hidden_layers"], len(layers)),
        ("vocab_size", config["vocab_size"], vocabulary),
        ("hidden_size", config["hidden_size"], hidden),
        ("intermediate_size", config["intermediate_size"], intermediate),
        ("num_attention_heads times head_dim", config["num_attention_heads"] * width, queries),
        ("num_key_value_heads times head_dim", config["num_key_value_heads"] * width, keys),
    ):
        if said != found:
            raise UserError(
                f"{source}/config.json: {key} is {said!s:.40}, but the weights have {found}; get both again"
            )


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a model folder.

    Args:
        folder: Model folder, with its weights in one file or in several with an index.

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


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON; get the file again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: does not hold a mapping; get the file again")
    return found


def _parts(index: Path) -> list[Path]:
    weight_map = _mapping(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    # files beside it, not elsewhere
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index}: not an index of weight files; get the file again")
    return [index.parent / name for name in sorted(set(names))]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except UnpicklingError as error:
        raise UserError(f"{path}: holds more than tensors and plain values; refused") from error
    except (SafetensorError, RuntimeError, EOFError, BadZipFile, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: missing, cut short or damaged; get the file again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict")
    for key, x in state.items():
        plain = x.device.type == "cpu" and x.layout == torch.strided and not x.is_nested
        if not isinstance(key, str) or not plain or x.dtype not in _TYPES:
            kind = str(x.dtype if plain else x.layout).removeprefix("torch.")
            raise UserError(
                f"{path}: {key} ({kind}) is not a plain tensor of float32, bfloat16 or float16, as the "
                "released codes save; get the checkpoint again"
            )
    return state

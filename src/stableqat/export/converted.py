"""A folder that `convert(model).save_pretrained(...)` wrote: plain weights, and the grids that they lie on.

The folder's `config.json` says which layers lie on which grid; their scales are recovered from the values.
Any scale and codes that give each weight bit for bit are as good as those of training; weights that were
changed or rounded since have none.
"""

import json
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from stableqat.api import GRIDS
from stableqat.errors import UserError
from stableqat.layers.linear import QuantLinear
from stableqat.modules import LlamaModule
from stableqat.ops import Grid, dequantize_codes, quantize_codes
from stableqat.quantizers import STE, Quantizer


def is_model_folder(source: str) -> bool:
    """Whether a source is a folder as transformers or timm save it, not a run."""
    folder = Path(source).expanduser()
    return (folder / "config.json").is_file() and not (folder / "config.yaml").exists()


def open_converted(source: str) -> LlamaModule:
    """Load the model of a converted folder with its layers quantized again, in evaluation mode.

    Args:
        source: Model folder.

    Raises:
        UserError: If the folder names no grids, or its weights do not lie on them.
    """
    folder = Path(source).expanduser()
    record = _record(folder / "config.json")
    module = LlamaModule(config=str(folder), init_from=str(folder))
    module.configure_model()
    model: Any = module.model
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    for kind in record:
        for name in kind.pop("layers"):
            if name not in layers:
                raise UserError(
                    f"{folder}/config.json: {GRIDS}: {name} is not a linear layer of the model, or is named "
                    "twice; save what `convert` returns again"
                )
            model.set_submodule(name, _quantized(name, layers.pop(name), kind))
    module.adapt(model)
    return module.eval()


def _record(file: Path) -> list[dict[str, Any]]:
    try:
        record = json.loads(file.read_text()).get(GRIDS)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not the configuration of a model; copy the folder again") from error
    if record is None:
        raise UserError(
            f"{file.parent}: a model folder that names no quantized layers; export the run or checkpoint "
            "that it came from, or save what stableqat.convert(model) returns with save_pretrained"
        )
    types = {
        "grid": (str,),
        "bits": (int,),
        "group_size": (int, NoneType),
        "per_channel": (bool,),
        "layers": (list,),
    }
    for kind in record if isinstance(record, list) and record else [None]:
        if not isinstance(kind, dict) or kind.keys() != types.keys():
            raise UserError(
                f"{file}: {GRIDS}: must list mappings of {', '.join(types)}; save the model again"
            )
        if wrong := [key for key in types if type(kind[key]) not in types[key]]:
            value = f"{wrong[0]}: {kind[wrong[0]]!r:.60}"
            raise UserError(f"{file}: {GRIDS}.{value} is of another type; save the model again")
    return record


def _quantized(name: str, linear: nn.Linear, kind: dict[str, Any]) -> QuantLinear:
    try:
        quantizer: Quantizer = STE(linear.weight.to("meta"), **kind)
    except UserError as error:
        raise UserError(f"config.json: {GRIDS}: layer {name}: {error}") from error
    if not torch.isfinite(linear.weight).all():
        raise UserError(f"layer {name} holds NaN or infinity; convert an earlier checkpoint")
    scale = find_scale(linear.weight.detach(), tuple(quantizer.scale.shape), quantizer.grid)
    if scale is None:
        raise UserError(
            f"layer {name}: its weights lie on no {quantizer.bits}-bit {quantizer.grid} grid: they were "
            "changed or rounded (saved in bfloat16?) after `convert`; save in float32 what `convert` returns"
        )
    quantizer.to_empty(device="cpu").load_state_dict({"scale": scale, "scale_floor": scale})
    return QuantLinear.from_linear(linear, quantizer)


def find_scale(weight: Tensor, shape: tuple[int, ...], grid: Grid) -> Tensor | None:
    """Find scales with which each weight is exactly a level, by trying every level for the largest weight.

    Args:
        weight: float32, `(out, in)`.
        shape: Of the scales, `(out, groups)` or `(1, 1)`.
        grid: The levels.

    Returns:
        Scales of that shape, or None.
    """
    rows = weight.reshape(shape[0] * shape[1], -1)
    peak = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    # zeros alone fit any scale, if zero is a level
    found = torch.where((peak == 0) & (grid.zero_point == 0), 1.0, torch.nan)
    levels = sorted({sign * level for level in grid.levels for sign in (-1, 1)} - {0}, key=abs, reverse=True)
    for level, ulp in product(levels, (0, -1, 1)):  # the peak is rounded: the scale is one unit off at most
        left = found.isnan().flatten().nonzero().flatten()
        if not len(left):
            break
        scale = (peak[left].double() / level).float().view(torch.int32).add(ulp).view(torch.float32)
        codes = quantize_codes(rows[left], scale, grid=grid)
        exact = (dequantize_codes(codes, scale, grid.zero_point, torch.float32) == rows[left]).all(1)
        found[left[exact]] = scale[exact]
    return found.reshape(shape) if found.isfinite().all() and found.all() else None

"""A model folder with quantized layers, as `save_pretrained` writes it after `prepare` or after `convert`.

Its `config.json` says which layers lie on which grid. A prepared model's files hold latent weights and the
parameters of its quantizers. A converted model's hold the quantized values, from which the scales are
recovered: any scale and codes that give each weight bit for bit are as good as those of training; weights
that were changed or rounded since have none.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stableqat.api import GRIDS, INPUTS
from stableqat.errors import UserError, first_line
from stableqat.layers.linear import QuantLinear
from stableqat.ops import Grid, dequantize_codes, quantize_codes
from stableqat.quantizers import STE, Quantizer
from stableqat.quantizers.factory import methods

QUANTIZER = ".weight_quantizer."
_FIELDS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "grid": (str,),
    "bits": (int,),
    "group_size": (int, NoneType),
    "per_channel": (bool,),
    "layers": (list,),
}


def is_model_folder(source: str) -> bool:
    """Whether a source is a folder as transformers or timm save it, not a run."""
    folder = Path(source).expanduser()
    return (folder / "config.json").is_file() and not (folder / "config.yaml").exists()


@contextmanager
def unreported() -> Iterator[None]:
    """Keep transformers from reporting the parameters of quantizers as unexpected."""
    log = logging.getLogger("transformers.modeling_utils")

    def others(record: logging.LogRecord) -> bool:
        return QUANTIZER not in record.getMessage()

    log.addFilter(others)
    try:
        yield
    finally:
        log.removeFilter(others)


def is_prepared(names: Iterable[str]) -> bool:
    """Whether tensors are those of a prepared model, by their names."""
    return any(QUANTIZER in name for name in names)


def read_grids(folder: Path) -> list[dict[str, Any]]:
    """Read which layers of a model folder lie on which grid.

    Raises:
        UserError: If the folder does not say it.
    """
    file = folder / "config.json"
    try:
        record = json.loads(file.read_text()).get(GRIDS)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not the configuration of a model; copy the folder again") from error
    if record is None:
        raise UserError(
            f"{file.parent}: a model folder that names no quantized layers; export the run or checkpoint "
            "that it came from, or save what stableqat.prepare or convert returns with save_pretrained"
        )
    if isinstance(record, list) and any(isinstance(kind, dict) and INPUTS in kind for kind in record):
        raise UserError(
            f"{file.parent}: its layers quantize their inputs, and a model folder holds no quantizers of "
            "inputs; name the run or checkpoint that it came from"
        )
    for kind in record if isinstance(record, list) and record else [None]:
        if not isinstance(kind, dict) or kind.keys() != _FIELDS.keys():
            raise UserError(
                f"{file}: {GRIDS}: must list mappings of {', '.join(_FIELDS)}; save the model again"
            )
        if wrong := [key for key in _FIELDS if type(kind[key]) not in _FIELDS[key]]:
            value = f"{wrong[0]}: {kind[wrong[0]]!r:.60}"
            raise UserError(f"{file}: {GRIDS}.{value} is of another type; save the model again")
    return record


def quantize_again(model: nn.Module, folder: Path, record: list[dict[str, Any]]) -> bool:
    """Quantize the layers of a loaded model as its folder says, in place.

    Args:
        model: The model with the plain weights of the folder, in float32.
        folder: The folder.
        record: Its `read_grids`.

    Returns:
        Whether the folder is a prepared model's, which brings its quantizers; otherwise a converted one's.

    Raises:
        UserError: If the weights do not fit what the folder says.
    """
    state = _quantizers(folder)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    for kind in record:
        method = kind.pop("method")
        for name in kind.pop("layers"):
            if name not in layers:
                raise UserError(
                    f"{folder}/config.json: {GRIDS}: {name} is not a linear layer of the model, or is named "
                    "twice; save the model again"
                )
            linear = layers.pop(name)
            if not torch.isfinite(linear.weight).all():
                raise UserError(f"layer {name} holds NaN or infinity; take an earlier checkpoint")
            made = _trained(name, linear, method, kind, state) if state else _recovered(name, linear, kind)
            model.set_submodule(name, QuantLinear.from_linear(linear, made))
    if lost := next(
        (name for name in layers if any(key.startswith(name + QUANTIZER) for key in state)), None
    ):
        raise UserError(
            f"{folder}/config.json: {GRIDS} does not name {lost}, which is quantized; save the model again"
        )
    return bool(state)


def _quantizers(folder: Path) -> dict[str, Tensor]:
    """The parameters of the quantizers of a prepared model; nothing of a converted one."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {key: tensors.get_tensor(key) for key in tensors.keys() if QUANTIZER in key}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cut short or damaged ({first_line(error)}); copy it again") from error
    return found


def _made(cls: type[Quantizer], name: str, linear: nn.Linear, kind: dict[str, Any]) -> Quantizer:
    try:
        return cls(linear.weight.to("meta"), **kind)
    except UserError as error:
        raise UserError(f"config.json: {GRIDS}: layer {name}: {error}") from error


def _trained(
    name: str, linear: nn.Linear, method: str, kind: dict[str, Any], state: dict[str, Tensor]
) -> Quantizer:
    """The quantizer of a layer of a prepared model."""
    if (cls := methods().get(method)) is None:
        raise UserError(
            f"layer {name}: its quantizer {method} is not of this package; save what "
            "stableqat.convert(model) returns instead"
        )
    made = _made(cls, name, linear, kind).to_empty(device="cpu")
    prefix = name + QUANTIZER
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    own = {key: tensor for key, tensor in own.items() if not key.startswith("freezing.")}  # for training
    try:
        made.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(": ")[2]
        raise UserError(f"layer {name}: its quantizer is not as config.json says ({reason:.150})") from error
    return made


def _recovered(name: str, linear: nn.Linear, kind: dict[str, Any]) -> Quantizer:
    """A quantizer that gives the weights of a layer of a converted model."""
    made = _made(STE, name, linear, kind)
    scale = find_scale(linear.weight.detach(), tuple(made.scale.shape), made.grid)
    if scale is None:
        raise UserError(
            f"layer {name}: its weights lie on no {made.bits}-bit {made.grid} grid: they were changed or "
            "rounded (saved in bfloat16?) after `convert`; save in float32 what `convert` returns"
        )
    made.to_empty(device="cpu").load_state_dict({"scale": scale, "scale_floor": scale})
    return made


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

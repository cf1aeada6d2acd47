"""Codes and scales of a moment of training on disk: the deployed weights in as many bits as the codes take.

A file holds two tensors per layer: `<layer>.codes`, uint8 with as many codes per byte as fit, lowest bits
first, and `<layer>.scale`. Everything else is the quantizer's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stableqat.errors import UserError, one_line
from stableqat.files import whole_file
from stableqat.landscape.space import WeightSpace
from stableqat.quantizers import QuantizedWeight

FOLDER = "trajectory"  # in a run's folder; its files are named by step


def codes_file(folder: Path, step: int) -> Path:
    """Where a run keeps the codes of a step."""
    return folder / FOLDER / f"step-{step:06d}.safetensors"


def kept_codes(folder: Path) -> dict[int, Path]:
    """The files of codes that a run has kept, by step, ascending."""
    found = {int(file.stem.partition("-")[2]): file for file in (folder / FOLDER).glob("step-*.safetensors")}
    return dict(sorted(found.items()))


def write_codes(space: WeightSpace, quantized: Iterable[QuantizedWeight], file: Path) -> None:
    """Write the deployed form of a space's weights.

    Args:
        space: The space.
        quantized: Codes and scales, one per weight.
        file: The file, which appears whole or not at all.
    """
    tensors: dict[str, Tensor] = {}
    for name, form in zip(space.weights, quantized, strict=True):
        tensors[f"{name}.codes"] = _packed(form.codes, form.bits).cpu()
        tensors[f"{name}.scale"] = form.scale.contiguous().cpu()
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as part:
        save_file(tensors, part)


def read_codes(space: WeightSpace, file: Path) -> Iterator[QuantizedWeight]:
    """Read what `write_codes` wrote, one weight at a time, on the weights' device.

    Args:
        space: A space of the same model, with the same quantizers.
        file: The file.

    Raises:
        UserError: If the file is damaged or of another model.
    """
    try:
        with safe_open(str(file), "pt") as held:
            for now, (name, weight) in zip(space.quantized(), space.weights.items(), strict=True):
                packed = held.get_tensor(f"{name}.codes").to(weight.device)
                scale = held.get_tensor(f"{name}.scale").to(now.scale)
                codes = _unpacked(packed, now.bits, now.codes.numel()).view_as(now.codes)
                yield replace(now, codes=codes, scale=scale.view_as(now.scale))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{file}: damaged, or of another model ({one_line(error)}); remove it") from error


def _packed(codes: Tensor, bits: int) -> Tensor:
    width, each = _layout(bits)
    flat = codes.flatten().to(torch.int16) & ((1 << width) - 1)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % each)]).view(-1, each)
    shifts = torch.arange(each, device=codes.device, dtype=torch.int16) * width
    return (flat << shifts).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    width, each = _layout(bits)
    shifts = torch.arange(each, device=packed.device, dtype=torch.int16) * width
    codes = (packed.to(torch.int16)[:, None] >> shifts) & ((1 << width) - 1)
    negative = codes >= 1 << (width - 1)
    return torch.where(negative, codes - (1 << width), codes).flatten()[:count].to(torch.int8)


def _layout(bits: int) -> tuple[int, int]:
    """Bits that a code takes here, and codes per byte."""
    width = next(width for width in (1, 2, 4, 8) if width >= bits)
    return width, 8 // width

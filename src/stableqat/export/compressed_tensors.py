"""compressed-tensors `pack-quantized`: what transformers decompresses and vLLM multiplies by.

Codes of b bits lie densely in 32-bit words, row by row, beside `weight_scale` and `weight_shape`. The
format's symmetric integers are the integer grid itself; half-integer grids take one more bit, as odd
integers. There is one scale per row or per group; each group costs 16 bits. Codes of 4 and 8 bits run on
every kernel of vLLM and SGLang, others on a single one of vLLM, so narrower codes can be stored in 4 or 8
bits.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stableqat.errors import UserError
from stableqat.export import hf
from stableqat.export.packed import PackedModel
from stableqat.quantizers import QuantizedWeight


def check(packed: PackedModel) -> None:
    """Refuse what the format or its loader cannot hold.

    Raises:
        UserError: For vision transformers, and for codes of nine bits or of more than `storage_bits`.
    """
    hf.check_language_model("compressed-tensors", packed)
    for name, weight in packed.layers.items():
        if isinstance(packed.model.get_submodule(name), torch.nn.Embedding):
            raise UserError(
                f"compressed-tensors: transformers cannot load a packed embedding ({name}) in this format; "
                "take gguf or torchao, or leave the embedding in full precision"
            )
        if weight.zero_point and weight.bits == 8:
            raise UserError(
                f"compressed-tensors: {name} would need 9-bit odd integers for the 8-bit {weight.grid} grid; "
                "take torchao, which has half-integer zero points"
            )
        if packed.storage_bits is not None and (wide := weight.integers().bits) > packed.storage_bits:
            raise UserError(
                f"storage_bits: {name} needs {wide}-bit integers for its {weight.grid} grid; "
                "leave it out, or take 8"
            )


def write(packed: PackedModel, folder: Path) -> None:
    """Write packed weights and configuration."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    state = packed.rest()
    stored = {name: _stored(packed, weight) for name, weight in packed.layers.items()}
    for name, weight in stored.items():
        state[f"{name}.weight_packed"] = pack_to_int32(weight.codes, weight.bits)
        state[f"{name}.weight_scale"] = weight.scale.to(packed.scale_dtype)
        state[f"{name}.weight_shape"] = torch.tensor(weight.codes.shape)
    hf.save(packed, folder, state, _quantization(packed, stored))


def read(packed: PackedModel, folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Return the quantized layers' weights and the batch's logits, as transformers decompresses them."""
    return hf.read(packed, folder)


def notes(packed: PackedModel) -> list[str]:
    """Return how each grid is stored, and what runs it."""
    counts = Counter((w.bits, w.grid, _stored(packed, w).bits) for w in packed.layers.values())
    lines = [
        f"{n} layers of the {bits}-bit {grid} grid in {wide} bits" for (bits, grid, wide), n in counts.items()
    ]
    if any(wide not in (4, 8) for _, _, wide in counts):
        lines.append(
            "for widths other than 4 and 8 bits vLLM has one kernel (humming-kernels, for NVIDIA GPUs) and "
            "SGLang none; --storage_bits 4 or 8 runs on all of theirs"
        )
    return lines


def _stored(packed: PackedModel, weight: QuantizedWeight) -> QuantizedWeight:
    """Return the integers to write."""
    weight = weight.integers()
    return weight if packed.storage_bits is None else replace(weight, bits=packed.storage_bits)


def _quantization(packed: PackedModel, stored: dict[str, QuantizedWeight]) -> dict[str, Any]:
    kinds: dict[tuple[int, int], list[str]] = {}
    for name, weight in stored.items():
        group = 0 if weight.scale.shape[1] == 1 else weight.group_size
        kinds.setdefault((weight.bits, group), []).append(name)
    inner = max(kinds.values(), key=len)
    groups = {}
    for number, ((bits, group), names) in enumerate(kinds.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if group else "channel",
            "group_size": group or None,
        }
        # vLLM finds fused layers by class, not by name
        groups[f"group_{number}"] = {"targets": ["Linear"] if names is inner else names, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": packed.plain_linears(),
    }

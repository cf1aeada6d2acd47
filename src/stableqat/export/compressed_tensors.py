"""compressed-tensors `pack-quantized`: what transformers decompresses and vLLM multiplies with.

Codes of b bits lie densely in 32-bit words, row by row, beside `weight_scale` and `weight_shape`. The
format's symmetric integers are the integer grid as it is; half-integer grids take one bit more, as odd
integers. Scales a row or a group; groups cost 16 bits each. Codes of 4 and 8 bits run on every kernel of
vLLM and SGLang, others on one of vLLM's, so that narrower codes can be stored in 4 or 8 bits.
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
    """Refuse what the format or its loader has no place for.

    Raises:
        UserError: For vision transformers, and codes of nine bits or of more than the storage's.
    """
    if packed.family == "vit":
        raise UserError(
            "compressed-tensors: its loaders read transformers language models, not timm's vision "
            "transformers; take onnx (packed) or hf (plain)"
        )
    for name, weight in packed.layers.items():
        if isinstance(packed.model.get_submodule(name), torch.nn.Embedding):
            raise UserError(
                f"compressed-tensors: transformers cannot load a packed embedding ({name}) in this format; "
                "take gguf or torchao, or leave the embedding in full precision"
            )
        if weight.zero_point and weight.bits == 8:
            raise UserError(
                f"compressed-tensors: {name} would take 9-bit odd integers for the 8-bit {weight.grid} grid; "
                "take torchao, which has half-integer zero points"
            )
        if packed.storage_bits is not None and (wide := weight.integers().bits) > packed.storage_bits:
            raise UserError(
                f"storage_bits: {name} takes {wide}-bit integers on its {weight.grid} grid; "
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
    """The packed layers' weights and the batch's logits, as transformers decompresses them."""
    model, logits = hf.load_language_model(packed, folder)
    return {name: model.get_submodule(name).weight.detach() for name in packed.layers}, logits


def notes(packed: PackedModel) -> list[str]:
    """How each grid is stored, and what runs it."""
    counts = Counter((w.bits, w.grid, _stored(packed, w).bits) for w in packed.layers.values())
    lines = [
        f"{n} layers of the {bits}-bit {grid} grid in {wide} bits" for (bits, grid, wide), n in counts.items()
    ]
    if any(wide not in (4, 8) for _, _, wide in counts):
        lines.append(
            "vLLM has one kernel for widths other than 4 and 8 bits (humming-kernels, for NVIDIA GPUs), "
            "SGLang none; to run on any of theirs take --storage_bits 4 or 8"
        )
    return lines


def _stored(packed: PackedModel, weight: QuantizedWeight) -> QuantizedWeight:
    """The integers that are written."""
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
        # fused layers of vLLM are found by class, not by name
        groups[f"group_{number}"] = {"targets": ["Linear"] if names is inner else names, "weights": weights}
    linears = [n for n, m in packed.model.named_modules() if isinstance(m, torch.nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in stored],
    }

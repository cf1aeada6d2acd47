"""torchao's Intx weights in safetensors: any grid natively, half-integer zero points included.

torchao's tensor takes one byte per code of any width, so the file is no smaller than int8; it is for torch's
own tools: `torch.export`, ExecuTorch, `from_pretrained`. There is one scale and zero point per row or per
group.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stableqat.export import hf
from stableqat.export.packed import PackedModel
from stableqat.quantizers import QuantizedWeight

FILE = "model.safetensors"


def check(packed: PackedModel) -> None:
    """Refuse vision transformers; the format holds every grid, width and granularity of other models.

    Raises:
        UserError: For a vision transformer.
    """
    hf.check_language_model("torchao", packed)


def write(packed: PackedModel, folder: Path) -> None:
    """Write torchao's tensors, flattened by torchao, and the configuration."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    state: dict[str, Any] = {name: tensor.contiguous() for name, tensor in packed.rest().items()}
    state |= {f"{name}.weight": _tensor(weight) for name, weight in packed.layers.items()}
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file(tensors, folder / FILE, metadata={**metadata, "format": "pt"})
    computes = replace(packed, dtype=torch.float32)  # as its tensors do, whatever the type of the rest
    hf.save_config(computes, folder, _quantization(packed))


def read(packed: PackedModel, folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weights as torchao dequantizes them, and the logits of the model that holds them."""
    model, logits = hf.load_language_model(packed, folder)
    read = {name: model.get_submodule(name).weight for name in packed.layers}
    return {name: weight.dequantize().detach() for name, weight in read.items()}, logits


def notes(packed: PackedModel) -> list[str]:
    """Return what the report says beside the figures."""
    return ["torchao takes one byte per code; for a small file take gguf, onnx or compressed-tensors"]


def _tensor(weight: QuantizedWeight) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    scale = weight.scale  # torchao computes values in the type of the scale; float32 rounds nothing
    return IntxUnpackedToInt8Tensor(
        qdata=weight.codes,
        scale=scale,
        zero_point=torch.full_like(scale, weight.zero_point),
        target_dtype=getattr(torch, f"int{weight.bits}"),
        block_size=(1, weight.group_size),
        dtype=torch.float32,
        activation_quantization=None,
    )


def _quantization(packed: PackedModel) -> dict[str, Any]:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import TorchAoConfig

    weight = next(iter(packed.layers.values()))
    granularity = PerAxis(0) if weight.scale.shape[1] == 1 else PerGroup(weight.group_size)
    scheme = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{weight.bits}"), granularity=granularity)
    embeddings = any(name.endswith("embed_tokens") for name in packed.layers)
    config = TorchAoConfig(
        quant_type=scheme,
        modules_to_not_convert=packed.plain_linears(),
        include_input_output_embeddings=embeddings,
    )
    return json.loads(config.to_json_string(use_diff=False))

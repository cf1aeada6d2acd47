"""Plain weights in safetensors for plain transformers or timm: not packed, but they run everywhere.

Quantized weights are stored as the values that they stand for: in the type of all others if it holds them,
otherwise in float32, which `config.json` then names. bfloat16's eight bits of precision hold few grids.
"""

import json
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stableqat.api import GRIDS
from stableqat.errors import UserError
from stableqat.export.packed import PackedModel


def check(packed: PackedModel) -> None:
    """Accept every model: plain weights hold any grid."""


def write(packed: PackedModel, folder: Path) -> None:
    """Write weights and configuration."""
    values = packed.values()
    own = _type(values.values(), packed.dtype)
    values = {name: value.to(own) for name, value in values.items()}
    save(replace(packed, dtype=own), folder, packed.rest() | values)


def read(packed: PackedModel, folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Return the quantized layers' weights and the batch's logits, as transformers or timm load them."""
    if packed.family == "vit":
        import timm

        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.no_grad():
            logits = model(packed.input)
    else:
        model, logits = load_language_model(packed, folder)
    # flat: a first layer that is linear here is a convolution there
    weights = {name: model.get_submodule(name).weight.detach().flatten(1) for name in packed.layers}
    return weights, logits


def notes(packed: PackedModel) -> list[str]:
    """Return whether the quantized weights have a type of their own."""
    one_by_one = (weight.dequantize() for weight in packed.layers.values())
    if _type(one_by_one, packed.dtype) == packed.dtype:
        return []
    return [f"quantized weights are float32, because {_name(packed.dtype)} would round their values"]


def _type(values: Iterable[Tensor], others: torch.dtype) -> torch.dtype:
    """Return the type of the quantized weights: that of the others, unless it would round a value."""
    exact = all(torch.equal(value.to(others).float(), value) for value in values)
    return others if exact else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_language_model(format: str, packed: PackedModel) -> None:
    """Refuse a vision transformer.

    Raises:
        UserError: Naming the format.
    """
    if packed.family not in ("llama", "qwen3"):
        raise UserError(
            f"{format}: nothing loads timm's vision transformers from it; take onnx (packed) or hf (plain)"
        )


def save(
    packed: PackedModel, folder: Path, state: dict[str, Tensor], quantization: dict[str, Any] | None = None
) -> None:
    """Write a state dict and the configuration that its loader expects.

    Args:
        packed: The model.
        folder: Existing folder.
        state: Tensors by name.
        quantization: The `quantization_config` of a packed format.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    save_config(packed, folder, quantization)


def save_config(packed: PackedModel, folder: Path, quantization: dict[str, Any] | None) -> None:
    """Write `config.json` alone."""
    if packed.family == "vit":
        config = _timm_config(packed)
    else:
        config = packed.model.config.to_dict()
        config["architectures"] = [type(packed.model).__name__]
        config["dtype"] = _name(packed.dtype)
        config["use_cache"] = True
        for key in ("_name_or_path", GRIDS):  # path of the start; grids of a converted folder
            config.pop(key, None)
        if quantization is not None:
            config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_language_model(packed: PackedModel, folder: Path, **options: Any) -> tuple[Any, Tensor]:
    """Return the model that plain `from_pretrained` loads from a folder in float32, and its logits."""
    from transformers import AutoModelForCausalLM

    with redirect_stderr(StringIO()):  # progress bars of two libraries
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, **options
        ).eval()
        with torch.no_grad():
            return model, model(input_ids=packed.input, use_cache=False).logits


def image_settings(packed: PackedModel) -> dict[str, Any]:
    """Return how images are resized and normalised, in timm's terms: the run's settings, or timm's own."""
    own = {key: packed.model.pretrained_cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return {"input_size": list(packed.input.shape[1:]), **(own if packed.images is None else packed.images)}


def _timm_config(packed: PackedModel) -> dict[str, Any]:
    model: Any = packed.model
    module: Any = packed.module
    return {
        "architecture": module.model_name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {**module.model_args, "num_classes": model.num_classes},
        **({} if packed.classes is None else {"label_names": packed.classes}),
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            **{key: model.pretrained_cfg[key] for key in ("first_conv", "classifier")},
            **image_settings(packed),
        },
    }

"""What quantizers a model has, and what it weighs with them, for tables, TensorBoard and reports."""

import math
from typing import Any

from torch import Tensor, nn

from stableqat.layers.latent import latent_weights
from stableqat.layers.linear import quantized_inputs
from stableqat.quantizers import Quantizer
from stableqat.quantizers.inputs import input_quantizers
from stableqat.surgery import SurgeryReport

_PLACE = ("pattern", "layers", "weights")  # of a kind, beside what its quantizers are


def kinds(model: nn.Module, report: SurgeryReport | None = None) -> list[dict[str, Any]]:
    """The kinds of quantizers that a model has, in the order of a mapping's patterns, or else of its layers.

    Args:
        model: The model.
        report: Of its surgery, for the patterns of a mapping.

    Returns:
        For each kind its pattern, if a mapping chose it, the number of its layers and of their weights, and
        the hyper-parameters of its quantizers. A pattern of layers in full precision has the method FP.
    """
    patterns = {} if report is None else report.patterns
    made, inputs = _quantized(model), quantized_inputs(model)
    found: dict[tuple[object, ...], dict[str, Any]] = {}
    for name in dict.fromkeys([*patterns, *made]):
        chosen = {"pattern": patterns[name]} if name in patterns else {}
        own = made[name][0].describe() if name in made else {"method": "FP"}
        if name in inputs:
            own = {**own, **inputs[name].describe()}
        kind = found.setdefault(
            tuple({**chosen, **own}.items()), {**chosen, "layers": 0, "weights": 0, **own}
        )
        kind["layers"] += 1
        kind["weights"] += made[name][1].numel() if name in made else 0
    return list(found.values())


def describe(model: nn.Module, report: SurgeryReport | None = None) -> dict[str, str | int | float]:
    """Flat hyper-parameters that name a model's quantizers in a table or in TensorBoard.

    Where layers differ a value is "mixed", `bits` is the mean over weights, and `quantizers` names all kinds.

    Args:
        model: The model.
        report: Of its surgery, for the patterns that chose the quantizers.
    """
    found = kinds(model, report)
    own = [{k: v for k, v in kind.items() if k not in _PLACE} for kind in found if kind["method"] != "FP"]
    if not own:
        return {"method": "FP"}
    first = own[0]
    if len(own) == len(found) and all(each == first for each in own):
        return _with_widths(first)
    shared = {key for key in first if all(key in each for each in own)}
    varying = {key for each in own for key in each if any(each[key] != o.get(key) for o in own)}
    mixed = {key: "mixed" if key in varying else first[key] for key in first if key in shared}
    if "bits" in varying:
        total = sum(kind.get("bits", 0) * kind["weights"] for kind in found)
        mixed["bits"] = round(total / sum(kind["weights"] for kind in found), 4)
    words = []
    for kind in found:
        others = [f"{key} {kind[key]}" for key in kind if key in varying - {"method", "bits", "grid"}]
        what = "FP" if kind["method"] == "FP" else "{method} {bits}-bit {grid}".format(**kind)
        where = kind.get("pattern", f"{kind['layers']} layers")
        words.append(f"{where}: {', '.join([what, *others])}")
    return {**_with_widths(mixed), "quantizers": "; ".join(words)}


def _with_widths(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the usual name of their widths, such as W4A8, where inputs are quantized."""
    if "input_bits" not in settings:
        return settings
    return {**settings, "widths": f"W{settings['bits']}A{settings['input_bits']}"}


def deployed_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters as an export packs them.

    `bits / 8` of each quantized weight, for its code, and two of each scale and of every parameter that is
    not quantized; what is tied counts once. A file may take more: metadata, a tokenizer, codes in wider
    fields, scales in float32; or less, with quantized embeddings.

    Args:
        model: The model, quantized or not; values are not read, so it may be on the meta device.
    """
    quantized = {weight: quantizer for quantizer, weight in _quantized(model).values()}
    others = {p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    others |= {
        p for made in input_quantizers(model).values() for p in made.parameters() if not p.requires_grad
    }
    rest = sum(p.numel() for p in model.parameters() if p not in quantized and p not in others)
    codes = sum(weight.numel() * quantizer.bits for weight, quantizer in quantized.items())
    return math.ceil(codes / 8) + 2 * (sum(each.scale.numel() for each in quantized.values()) + rest)


def _quantized(model: nn.Module) -> dict[str, tuple[Quantizer, Tensor]]:
    """The quantizer and the latent weight of quantized layers and of fused experts, by name."""
    return {name: (each.quantizer, each.parameter) for name, each in latent_weights(model).items()}

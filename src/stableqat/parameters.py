"""Parameter groups for an optimizer: weights (decayed), scales (with their own learning rate), the rest.

Adam moves a parameter by about its learning rate per step, whatever the gradient, and scales are small.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from stableqat.layers.linear import QuantLinear
from stableqat.quantizers import Quantizer

KINDS = ("weights", "scales", "norms_and_biases")


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    scale_lr_multiplier: float = 0.1,
    lr_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameters for an optimizer: weights (with decay), scales and the rest (both without).

    A group without parameters is left out, so that full precision gets an ordinary optimizer. A parameter
    that a quantizer's `roles` calls a weight is grouped like the model's own weights; all parameters of an
    input quantizer without `roles` are scales.

    Args:
        model: The model, after surgery. A module's `no_weight_decay()`, as timm defines it, is respected.
        lr: Learning rate of weights and the rest; None leaves all learning rates to the optimizer.
        scale_lr_multiplier: Learning rate of the scales as a share of `lr`.
        lr_factors: Learning rate of a parameter as a share of its group's, by name, where it is not 1: deeper
            layers of a pretrained model may learn more slowly. Each share has groups of its own.

    Returns:
        Groups as `torch.optim` takes them, each with a `name`, its `kind` (weights, scales or
        norms_and_biases) and its `lr_factor`.
    """
    scales = set()
    for quantizer in _quantizers(model):
        roles = quantizer.roles() if hasattr(quantizer, "roles") else {}  # type: ignore[operator]
        scales |= {id(p) for name, p in quantizer.named_parameters() if roles.get(name, "scale") == "scale"}
    exempt = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }
    factors = lr_factors or {}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "weights" if parameter.ndim >= 2 and name not in exempt else "norms_and_biases"
            kind = "scales" if id(parameter) in scales else kind
            groups.setdefault((kind, factors.get(name, 1.0)), []).append(parameter)
    made = []
    for kind, factor in sorted(groups, key=lambda each: (KINDS.index(each[0]), -each[1])):
        group: dict[str, Any] = {"name": kind if factor == 1 else f"{kind} x {factor:.3g}"}
        group |= {"params": groups[kind, factor], "kind": kind, "lr_factor": factor}
        if kind != "weights":
            group["weight_decay"] = 0.0
        if lr is not None:
            group["lr"] = lr * factor * (scale_lr_multiplier if kind == "scales" else 1.0)
        made.append(group)
    return made


def _quantizers(model: nn.Module) -> Iterator[nn.Module]:
    """Quantizers of weights and of inputs."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            yield module
        elif isinstance(module, QuantLinear) and module.input_quantizer is not None:
            yield module.input_quantizer

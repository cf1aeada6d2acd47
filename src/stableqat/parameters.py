"""Parameter groups for an optimizer: weights (decayed), scales and factors (at rates of their own), the rest.

Adam moves a parameter by about its learning rate per step, whatever the gradient, and scales are small.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from stableqat.layers.linear import QuantLinear
from stableqat.quantizers import Quantizer
from stableqat.quantizers.inputs import InputQuantizer

KINDS = ("weights", "scales", "factors", "norms_and_biases")


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    scale_lr_multiplier: float = 0.1,
    lr_factors: Mapping[str, float] | None = None,
    factor_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameters for an optimizer: weights (with decay), scales and the rest (both without).

    A group without parameters is left out, so that full precision gets an ordinary optimizer. A parameter
    that a quantizer's `roles` calls a weight is grouped like the model's own weights; low-rank factors are a
    group of their own; all parameters of an input quantizer without `roles` are scales.

    Args:
        model: The model, after surgery. A module's `no_weight_decay()`, as timm defines it, is respected.
        lr: Learning rate of weights and the rest; None leaves all learning rates to the optimizer.
        scale_lr_multiplier: Learning rate of the scales as a share of `lr`.
        lr_factors: Learning rate of a parameter as a share of its group's, by name, where it is not 1: deeper
            layers of a pretrained model may learn more slowly. Each share has groups of its own.
        factor_lr_multiplier: Learning rate of low-rank factors as a share of `lr`.

    Returns:
        Groups as `torch.optim` takes them, each with a `name`, its `kind` (weights, scales,
        factors or norms_and_biases) and its `lr_factor`.
    """
    role_of: dict[int, str] = {}
    for quantizer in _quantizers(model):
        roles = quantizer.roles() if hasattr(quantizer, "roles") else {}  # type: ignore[operator]
        role_of |= {id(p): roles.get(name, "scale") for name, p in quantizer.named_parameters()}
    exempt = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }
    group_of = {"scale": "scales", "factor": "factors"}
    multipliers = {"scales": scale_lr_multiplier, "factors": factor_lr_multiplier}
    shares = lr_factors or {}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "weights" if parameter.ndim >= 2 and name not in exempt else "norms_and_biases"
            kind = group_of.get(role_of.get(id(parameter), ""), kind)
            groups.setdefault((kind, shares.get(name, 1.0)), []).append(parameter)
    made = []
    for kind, share in sorted(groups, key=lambda each: (KINDS.index(each[0]), -each[1])):
        group: dict[str, Any] = {"name": kind if share == 1 else f"{kind} x {share:.3g}"}
        group |= {"params": groups[kind, share], "kind": kind, "lr_factor": share}
        if kind != "weights":
            group["weight_decay"] = 0.0
        if lr is not None:
            group["lr"] = lr * share * multipliers.get(kind, 1.0)
        made.append(group)
    return made


def _quantizers(model: nn.Module) -> Iterator[nn.Module]:
    """Quantizers of weights and of inputs."""
    for module in model.modules():
        if isinstance(module, Quantizer | InputQuantizer):
            yield module
        elif isinstance(module, QuantLinear) and module.input_quantizer is not None:
            yield module.input_quantizer

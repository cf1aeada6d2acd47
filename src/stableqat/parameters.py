"""Parameter groups for an optimizer: weights (decayed), scales (with their own learning rate), the rest.

Adam moves a parameter by about its learning rate per step, whatever the gradient, and scales are small.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from stableqat.layers.linear import QuantLinear
from stableqat.quantizers import Quantizer


def parameter_groups(
    model: nn.Module, lr: float | None = None, scale_lr_multiplier: float = 0.1
) -> list[dict[str, Any]]:
    """Parameters for an optimizer: weights (with decay), scales and the rest (both without).

    A group without parameters is left out, so that full precision gets an ordinary optimizer. A parameter
    that a quantizer's `roles` calls a weight is grouped like the model's own weights; all parameters of an
    input quantizer without `roles` are scales.

    Args:
        model: The model, after surgery. A module's `no_weight_decay()`, as timm defines it, is respected.
        lr: Learning rate of weights and the rest; None leaves all learning rates to the optimizer.
        scale_lr_multiplier: Learning rate of the scales as a share of `lr`.

    Returns:
        Groups as `torch.optim` takes them, each with a `name`.
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
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "norms_and_biases": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "weights" if parameter.ndim >= 2 and name not in exempt else "norms_and_biases"
            groups["scales" if id(parameter) in scales else kind].append(parameter)
    made: list[dict[str, Any]] = [{"name": n, "params": params} for n, params in groups.items() if params]
    for group in made:
        if group["name"] != "weights":
            group["weight_decay"] = 0.0
        if lr is not None:
            group["lr"] = lr * (scale_lr_multiplier if group["name"] == "scales" else 1.0)
    return made


def _quantizers(model: nn.Module) -> Iterator[nn.Module]:
    """Quantizers of weights and of inputs."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            yield module
        elif isinstance(module, QuantLinear) and module.input_quantizer is not None:
            yield module.input_quantizer

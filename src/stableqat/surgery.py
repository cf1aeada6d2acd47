"""Swap a model's linear layers for quantized ones, in place, keeping everything else.

`QuantLinear` computes `F.linear(input_quantizer(x), weight_quantizer(weight), bias)` on the very
Parameters of the layer it replaces, so ties, optimizers and state-dict keys survive; a quantizer only adds
keys of its own beside. Only `type(m) is nn.Linear` is swapped: a subclass computes something
that is not ours to replace. Running the surgery twice changes nothing.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableqat.errors import UserError
from stableqat.quantizers import Quantizer, QuantizerFactory

logger = logging.getLogger(__name__)


class QuantLinear(nn.Linear):
    """A linear layer whose weight is fake-quantized in every forward.

    The latent weight stays a full-precision Parameter under its own name.
    """

    weight_quantizer: Quantizer
    input_quantizer: nn.Module | None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, weight_quantizer: Quantizer, input_quantizer: nn.Module | None = None
    ) -> "QuantLinear":
        """Wrap the Parameters of `linear`, without copying them.

        Args:
            linear: The layer to replace.
            weight_quantizer: Quantizer of its weight.
            input_quantizer: Module applied to the activations; None leaves them alone.

        Returns:
            The quantized layer.
        """
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_quantizer, layer.input_quantizer = weight_quantizer, input_quantizer
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in) -> (..., out)`."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


@dataclass
class SurgeryReport:
    """What `quantize_linears` did.

    Attributes:
        swapped: Names of the layers that are quantized now.
        skipped: Names of linear layers left alone, each with the reason.
        unmatched: Skip patterns that matched no linear layer.
    """

    swapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        reasons = "; ".join(f"{name} ({why})" for name, why in self.skipped.items())
        quantized, left = len(self.swapped), len(self.skipped)
        return f"{quantized} linear layers quantized, {left} left alone: {reasons or 'none'}"


def quantize_linears(
    model: nn.Module, quantizer: QuantizerFactory, skip: Sequence[str] = (), *, initialize: bool = True
) -> SurgeryReport:
    """Replace the linear layers of `model` in place.

    Args:
        model: Any module; may live on the meta device.
        quantizer: Makes a layer's quantizer from its weight.
        skip: Shell patterns; a layer is left alone if one matches its full name or a part between dots.
        initialize: Set the scales from the weights. False leaves them unset (NaN), for a state dict
            that follows.

    Returns:
        Which layers were swapped, which were not, and why.

    Raises:
        UserError: With the layer's name, if a quantizer refuses its weight; if `model` is itself a layer.
    """
    if isinstance(model, nn.Linear):
        raise UserError("a single Linear cannot be swapped in place; wrap it, or use QuantLinear.from_linear")
    report = SurgeryReport()
    replacements: dict[int, QuantLinear] = {}
    used_patterns: set[str] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Linear):
            continue
        matching = [p for p in skip if _matches(name, p)]
        used_patterns.update(matching)
        if isinstance(module, QuantLinear):
            report.skipped[name] = "quantized already"
        elif type(module) is not nn.Linear:
            report.skipped[name] = f"a {type(module).__name__}, not a plain Linear"
        elif matching:
            report.skipped[name] = f"skip: {matching[0]}"
        else:
            if id(module) not in replacements:  # one module under two names stays one module
                try:
                    made = _make_quantizer(module.weight, quantizer, initialize)
                except UserError as error:
                    raise UserError(f"layer {name}: {error}") from error
                replacements[id(module)] = QuantLinear.from_linear(module, made)
            model.set_submodule(name, replacements[id(module)])
            report.swapped.append(name)
    report.unmatched = [p for p in skip if p not in used_patterns]
    logger.info("%s", report)
    return report


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a model by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def _make_quantizer(weight: Tensor, factory: QuantizerFactory, initialize: bool) -> Quantizer:
    if initialize or weight.is_meta:
        return factory(weight)
    quantizer = factory(weight.to("meta")).to_empty(device=weight.device)
    for parameter in quantizer.parameters():
        nn.init.constant_(parameter, torch.nan)  # loud, should no state dict follow
    return quantizer


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatchcase(part, pattern) for part in (name, *name.split(".")))

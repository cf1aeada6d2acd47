"""The latent weights of a model: of quantized layers and of fused experts, each with its quantizer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from stableqat.layers.experts import as_rows, from_rows, quantized_experts
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import Quantizer


class LatentWeight(NamedTuple):
    """A parameter that is quantized.

    Attributes:
        quantizer: Its quantizer.
        parameter: The parameter.
        to_rows: Turns a tensor shaped like the parameter into the `(out, in)` that the quantizer takes.
        from_rows: Its inverse.
    """

    quantizer: Quantizer
    parameter: Tensor
    to_rows: Callable[[Tensor], Tensor]
    from_rows: Callable[[Tensor], Tensor]


def latent_weights(model: nn.Module) -> dict[str, LatentWeight]:
    """The latent weights of a model, by the name of their layer or, for experts, of the parameter."""
    found = {
        name: LatentWeight(layer.weight_quantizer, layer.latent, _same, _same)
        for name, layer in quantized_layers(model).items()
    }
    for name, (module, key, quantizer) in quantized_experts(model).items():
        parameter = module.get_parameter(key)
        back = partial(from_rows, module, shape=parameter.shape)
        found[name] = LatentWeight(quantizer, parameter, partial(as_rows, module), back)
    return found


def store_weights(model: nn.Module) -> None:
    """Bring the weights that do not train into the form that their quantizers keep, such as a byte each.

    Do it last: before, a weight has its values. The Parameters stay the same.

    Args:
        model: The model, with its weights and quantizers set, or to be set by a state dict.
    """
    for layer in quantized_layers(model).values():
        if not layer.weight_quantizer.trains_weight:
            layer.latent.data = layer.weight_quantizer.stored(layer.latent.detach())


def _same(weight: Tensor) -> Tensor:
    return weight

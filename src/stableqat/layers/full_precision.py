"""The model in full precision, on the weights of the quantized one: what it was before surgery."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from stableqat.layers.attention import QuantAttention
from stableqat.layers.experts import quantized_experts
from stableqat.layers.hold import release_weights
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import Quantizer


class _Latent(nn.Module):
    """Stands in for a quantizer and rounds nothing."""

    fuses = False

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.latent = quantizer.latent  # the quantizer does not become a submodule

    def forward(self, weight: Tensor) -> Tensor:
        latent = self.latent(weight)
        return latent.full_tensor() if isinstance(latent, DTensor) else latent  # FSDP2 gathers its codes

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object) -> Tensor:
        return F.linear(input, self(weight), bias)

    def implementation(self, weight: Tensor) -> str:
        return "torch"


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Inside, quantized layers, tied embeddings and experts compute with plain weights and activations.

    Nothing is copied, and sharded weights work as well. A compiled model compiles anew, unless it is told to
    run eagerly.

    Args:
        model: The model. Its quantizers are not among its modules meanwhile, so do not save it inside.
    """
    release_weights(model)
    places: list[tuple[nn.Module, str]] = []
    places += [(layer, "weight_quantizer") for layer in quantized_layers(model).values()]
    places += [(module, f"{key}_quantizer") for module, key, _ in quantized_experts(model).values()]
    inputs = [layer for layer in quantized_layers(model).values() if layer.input_quantizer is not None]
    places += [(layer, "input_quantizer") for layer in inputs]
    places += [(m, "attention_quantizer") for m in model.modules() if isinstance(m, QuantAttention)]
    quantizers = [module._modules[name] for module, name in places]
    try:
        for module, name in places:
            made = module._modules[name]
            if not isinstance(made, _Latent):  # which the model around a part of it has put there
                module._modules[name] = _Latent(made) if isinstance(made, Quantizer) else None
        yield
    finally:
        for (module, name), quantizer in zip(places, quantizers, strict=True):
            module._modules[name] = quantizer

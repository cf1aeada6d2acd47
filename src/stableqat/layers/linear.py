"""`QuantLinear`: a linear layer whose weight is fake-quantized.

It computes `F.linear(input_quantizer(x), weight_quantizer(weight), bias)` on the very Parameters of the layer
that it replaces, so ties, optimizers and state-dict keys survive; a quantizer only adds keys of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from stableqat import ops
from stableqat.errors import UserError
from stableqat.layers.group import LayerGroup
from stableqat.quantizers import Quantizer


class QuantLinear(nn.Linear):
    """A linear layer whose weight is fake-quantized.

    The latent weight stays a full-precision Parameter under its own name. What it becomes is computed in
    every forward, unless it is held.

    Attributes:
        weight_quantizer: Quantizer of the weight.
        input_quantizer: Module applied to the activations, or None.
        recompute: Recompute the fake-quantized weight in the backward instead of saving it (a held one is
            there anyway). None does on a GPU, where it costs next to nothing, except where a block's
            layers are fake-quantized together: at small batches, and where activations outweigh weights.
    """

    weight_quantizer: Quantizer
    input_quantizer: nn.Module | None
    recompute: bool | None
    _group: LayerGroup | None
    _place: int  # among the layers of its group
    _held: tuple[Tensor, list[tuple[Tensor, int]]] | None  # value, and of which parameters in which versions

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, weight_quantizer: Quantizer, input_quantizer: nn.Module | None = None
    ) -> "QuantLinear":
        """Wrap the Parameters of `linear`, without copying them, and its forward and backward hooks.

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
        layer.recompute = layer._group = layer._held = None
        keep_hooks(linear, layer)
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The plain layer on the same Parameters, the weight set to its deployed value.

        Raises:
            UserError: If activations are quantized, too, which no weight can hold.
        """
        if self.input_quantizer is not None:
            raise UserError("a layer that quantizes its input cannot become a plain Linear")
        if self._group is not None:
            self._group.dissolve()
        self.release()
        self.weight.copy_(self.weight_quantizer.quantize(self.weight).dequantize())
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        keep_hooks(self, linear)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in) -> (..., out)`."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        value, quantizer = self.known_value(), self._quantizer
        return quantizer.linear(input, self.latent, self.bias, recompute=self.recompute, value=value)

    def value(self) -> Tensor:
        """The fake-quantized weight with its gradient, for whatever multiplies with it around the layer."""
        value = self.known_value()
        if value is None:
            return self.weight_quantizer(self.latent)
        if value.requires_grad:
            return value
        return self.weight_quantizer.many([self.operands()], [value])[0]

    def operands(self) -> ops.Operands:
        """The weight with its quantizer's parameters."""
        return self._quantizer.operands(self.latent)

    @property
    def _quantizer(self) -> Quantizer:
        return self._modules["weight_quantizer"]  # type: ignore[return-value]  # without a module's slow search

    @property
    def latent(self) -> Tensor:
        """The latent weight, also while a module that reads `weight` is shown the fake-quantized one."""
        weight = self._parameters.get("weight")  # not there if it is parametrized, or a replica's
        return self.weight if weight is None else weight

    def known_value(self) -> Tensor | None:
        """The fake-quantized weight, if it is known already: made by the layer's group, or held."""
        group = self._group
        if group is not None and group.values is not None:
            value = group.value_of(self._place, self.latent)
            if value is not None:
                return value
        return None if self._held is None else self._held_value()

    @property
    def implementation(self) -> str:
        """What fake-quantizes the weight where it is now: triton or torch."""
        return self.weight_quantizer.implementation(self.latent)

    @torch.inference_mode(False)  # so that training may use it, too
    @torch.no_grad()
    def hold(self) -> None:
        """Keep the fake-quantized weight for later forwards, until `release` or until a parameter changes.

        The value has the type of the autocast region of this call. A quantizer with a forward of its own,
        which may be stochastic, is not held.
        """
        if self.weight_quantizer.fuses and (self._held is None or self._held_value() is None):
            self._held = self.weight_quantizer(self.latent), self._versions()

    def release(self) -> None:
        """Forget what `hold` kept."""
        self._held = None

    def _held_value(self) -> Tensor | None:
        assert self._held is not None
        value, made_of = self._held
        # a compiled graph cannot ask for versions: whoever holds releases before weights change
        if torch.compiler.is_compiling():
            return value
        now = self._versions()
        if len(now) == len(made_of) and all(
            p is q and v == w for (p, v), (q, w) in zip(made_of, now, strict=True)
        ):
            return value
        self.release()
        return None

    def _versions(self) -> list[tuple[Tensor, int]]:
        parameters = (self.latent, *self.weight_quantizer.parameters())
        return [(p, 0 if p.is_inference() else p._version) for p in parameters]

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        self.release()  # moved to another device or type
        return super()._apply(fn, recurse)


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a model by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Share the very dicts of hooks of the layer that is replaced: whoever added one can remove it."""
    kept = ("_forward_", "_backward_", "_is_full_backward_")
    vars(new).update({name: value for name, value in vars(old).items() if name.startswith(kept)})

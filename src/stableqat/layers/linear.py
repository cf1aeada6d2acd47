"""`QuantLinear`: a linear layer whose weight is fake-quantized.

It computes `F.linear(input_quantizer(x), weight_quantizer(weight), bias)` on the Parameters of the layer that
it replaces, so ties, optimizers and state-dict keys survive; a quantizer only adds keys of its own.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stableqat import ops
from stableqat.errors import UserError
from stableqat.layers.group import LayerGroup
from stableqat.quantizers import Quantizer
from stableqat.quantizers.inputs import InputQuantizer

if TYPE_CHECKING:
    from stableqat.layers.gathered import GatheredWeight

Layer = TypeVar("Layer", bound=nn.Linear)


class QuantLinear(nn.Linear):
    """A linear layer whose weight is fake-quantized.

    The latent weight stays a full-precision Parameter under its own name. Every forward computes the
    fake-quantized weight, unless it is held.

    Attributes:
        weight_quantizer: Quantizer of the weight.
        input_quantizer: Quantizer of the activations, which the product applies, or any module applied before
            it, or None.
        recompute: Recompute the fake-quantized weight in the backward instead of saving it; a held one is
            never recomputed. None recomputes on a GPU, where it costs next to nothing, unless the layers of
            a block are fake-quantized together: at small batches, and where activations outweigh weights.
    """

    weight_quantizer: Quantizer
    input_quantizer: nn.Module | None
    recompute: bool | None
    _group: LayerGroup | None
    _place: int  # among the layers of its group
    _gathered: "GatheredWeight | None"
    _held: (
        tuple[Tensor, list[tuple[Tensor, int]]] | None
    )  # the value, and the versions of the parameters it is made of

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, weight_quantizer: Quantizer, input_quantizer: nn.Module | None = None
    ) -> "QuantLinear":
        """Make a quantized layer on the Parameters and hooks of `linear`, without copying them.

        Args:
            linear: The layer to replace.
            weight_quantizer: Quantizer of its weight.
            input_quantizer: See `QuantLinear`; None leaves the activations alone.

        Returns:
            The quantized layer.
        """
        layer = _rebuilt(cls, linear)
        layer.weight_quantizer, layer.input_quantizer = weight_quantizer, input_quantizer
        layer.recompute = layer._group = layer._gathered = layer._held = None
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The plain layer on the same Parameters, with the weight set to its deployed value.

        Raises:
            UserError: If the layer also quantizes its input, which a plain layer cannot do.
        """
        if self.input_quantizer is not None:
            raise UserError("a layer that quantizes its input cannot become a plain Linear")
        if self._group is not None:
            self._group.dissolve()
        self.release()
        deployed = self.weight_quantizer.quantize(self.weight).dequantize()
        if self.weight_quantizer.trains_weight:
            self.weight.copy_(deployed)
        else:
            self.weight.data = deployed  # may have been stored in another type
            self.weight.requires_grad_(True)
        return _rebuilt(nn.Linear, self).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in) -> (..., out)`."""
        of_input, made = None, self.input_quantizer
        if isinstance(made, InputQuantizer):
            of_input = made.activation()
        elif made is not None:
            input = made(input)
        value = self.known_value()
        if value is not None and value.requires_grad:
            return ops.product(input, value, self.bias, of_input=of_input)
        return self._quantizer.linear(
            input, self.latent, self.bias, recompute=self.recompute, value=value, of_input=of_input
        )

    def value(self) -> Tensor:
        """The fake-quantized weight with its gradient, for code that multiplies with it itself."""
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
        return self._modules["weight_quantizer"]  # type: ignore[return-value]  # skips nn.Module's slow lookup

    @property
    def latent(self) -> Tensor:
        """The latent weight, even where `weight` is the fake-quantized one: shown to a module or gathered."""
        if self._gathered is not None:
            return self._gathered.parameter
        weight = self._parameters.get("weight")  # missing if it is parametrized, or in a replica
        return self.weight if weight is None else weight

    def known_value(self) -> Tensor | None:
        """The fake-quantized weight if it is already known: gathered, computed by the group, or held."""
        if self._gathered is not None:
            weight = self._parameters["weight"]
            return weight if self._quantizer.fuses and not isinstance(weight, DTensor) else None
        group = self._group
        if group is not None and group.values is not None:
            value = group.value_of(self._place, self.latent)
            if value is not None:
                return value
        return None if self._held is None else self._held_value()

    @property
    def implementation(self) -> str:
        """What fake-quantizes the weight on its present device: triton or torch."""
        return self.weight_quantizer.implementation(self.latent)

    @torch.inference_mode(False)  # so that training may use it too
    @torch.no_grad()
    def hold(self) -> None:
        """Hold the fake-quantized weight for later forwards, until `release` or until a parameter changes.

        Its type is that of the autocast region of this call. The value of a quantizer with a forward of its
        own is not held, because it may be stochastic.
        """
        if self.weight_quantizer.fuses and (self._held is None or self._held_value() is None):
            self._held = self.weight_quantizer(self.latent), self._versions()

    def release(self) -> None:
        """Release what `hold` holds."""
        self._held = None

    def _held_value(self) -> Tensor | None:
        assert self._held is not None
        value, made_of = self._held
        # a compiled graph cannot ask for versions: whoever holds a weight releases it before it changes
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
    """The quantized layers of a model by name; a layer with several names counts once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def quantized_inputs(model: nn.Module) -> dict[str, InputQuantizer]:
    """The quantizers of inputs by the names of their layers."""
    made = {name: layer.input_quantizer for name, layer in quantized_layers(model).items()}
    return {name: quantizer for name, quantizer in made.items() if isinstance(quantizer, InputQuantizer)}


@torch.no_grad()
def undeployed(model: nn.Module) -> str | None:
    """A quantized layer that evaluates other values than it deploys, by a forward of its quantizer's own."""
    for name, layer in quantized_layers(model).items():
        quantizer, weight = layer.weight_quantizer, layer.latent
        if quantizer.fuses or isinstance(weight, DTensor):
            continue
        trains = quantizer.training
        evaluated = quantizer.eval()(weight).float()
        quantizer.train(trains)
        deployed = quantizer.quantize(weight).dequantize().float()
        near = 1e-2 * deployed.abs().amax().item()  # as autocast and a rotation round
        if not torch.allclose(evaluated, deployed, rtol=1e-2, atol=near):
            return name
    return None


def _rebuilt(kind: type[Layer], linear: nn.Linear) -> Layer:
    """A layer of another class on the same Parameters and hooks: whoever added a hook can still remove it."""
    with torch.device("meta"):
        made = kind(linear.in_features, linear.out_features, linear.bias is not None)
    made.weight, made.bias = linear.weight, linear.bias
    kept = ("_forward_", "_backward_", "_is_full_backward_")
    vars(made).update({name: value for name, value in vars(linear).items() if name.startswith(kept)})
    return made

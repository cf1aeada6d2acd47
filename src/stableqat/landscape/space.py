"""The quantized layers' weights of a model as one vector, read, moved in place and put back bit for bit.

A point is a list with one tensor per weight, shaped and typed like it. A direction is any iterable of such
tensors: a list, or one that draws or loads each tensor anew when it is asked for, which saves memory. The
model itself is never copied. The trade-off: a move writes all weights once, in float32 one read and one write
of each per direction, which is little beside a forward pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stableqat.errors import UserError, did_you_mean
from stableqat.layers.hold import release_weights
from stableqat.layers.latent import LatentWeight, latent_weights
from stableqat.quantizers import QuantizedWeight, Quantizer

Point = list[Tensor]
Direction = Iterable[Tensor]
Losses = Sequence[Callable[[], Tensor]]
"""Losses at the present weights, one per batch and each a scalar; what is measured is their mean."""


class ParameterSpace:
    """Some parameters of a model as one vector.

    Args:
        model: The model.
        weights: The parameters by name, whole ones.

    Attributes:
        weights: The parameters.

    Raises:
        UserError: If a parameter is sharded.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._model, self.weights = model, dict(weights)
        if any(isinstance(weight, DTensor) for weight in self.weights.values()):
            raise UserError(
                "the weights are sharded, and a direction needs whole ones; use one process or ddp"
            )

    def __len__(self) -> int:
        """Number of weights that are tensors."""
        return len(self.weights)

    @property
    def size(self) -> int:
        """Number of weights that are numbers."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def quantizes(self) -> bool:
        """Whether the model fake-quantizes now; it does not inside `full_precision(model)`."""
        return any(isinstance(module, Quantizer) for module in self._model.modules())

    def get(self) -> Point:
        """A copy of the weights."""
        return [weight.detach().clone() for weight in self.weights.values()]

    @torch.no_grad()
    def set(self, point: Iterable[Tensor]) -> None:
        """Set the weights to a point, in place."""
        for weight, value in zip(self.weights.values(), point, strict=True):
            weight.copy_(value)

    @torch.no_grad()
    def move(self, start: Iterable[Tensor], *steps: tuple[float, Direction]) -> None:
        """Set the weights to `start` plus the sum of `coefficient * direction`, in place.

        Args:
            start: A point.
            steps: Coefficients with their directions; they may be of another type than the weights.
        """
        directions = [iter(direction) for _, direction in steps]
        for weight, before in zip(self.weights.values(), start, strict=True):
            weight.copy_(before)
            for (coefficient, _), direction in zip(steps, directions, strict=True):
                weight.add_(next(direction), alpha=coefficient)

    @torch.no_grad()
    def between(self, start: Iterable[Tensor], end: Iterable[Tensor], share: float) -> None:
        """Set the weights to `start + share (end - start)`, exactly the ends at 0 and 1."""
        for weight, first, last in zip(self.weights.values(), start, end, strict=True):
            weight.copy_(torch.lerp(first, last.to(first), share))

    @contextmanager
    def kept(self) -> Iterator[Point]:
        """Put the weights back at the end, bit for bit, also after an exception.

        Yields:
            The weights as they are at the beginning; a copy that a move can start from.
        """
        release_weights(self._model)  # a compiled forward would not see that a weight has changed
        start = self.get()
        try:
            yield start
        finally:
            self.set(start)

    def noise(self, seed: int) -> "Noise":
        """Standard normal noise of a seed, drawn anew each time to save memory."""
        return Noise(self, seed)


def trained_weights(model: nn.Module) -> dict[str, LatentWeight]:
    """The latent weights of a model that train, by the name of their layer."""
    return {name: each for name, each in latent_weights(model).items() if each.parameter.requires_grad}


class WeightSpace(ParameterSpace):
    """The space of a model's latent weights that train, with their quantizers.

    Args:
        model: A model with quantized layers.
        layers: Names of the layers to take; None takes all.

    Attributes:
        weights: The parameters, by the name of their layer.

    Raises:
        UserError: If there is no such layer, weights are sharded, or all are frozen, as LR-QAT's are.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None = None) -> None:
        known = trained_weights(model)
        if not known and latent_weights(model):
            raise UserError(
                "the weights of all quantized layers are frozen, so none can move; take a method that trains "
                "them, which LRQAT does not"
            )
        for name in layers or ():
            if name not in known:
                raise UserError(f"layers: no quantized layer is called {name}; {did_you_mean(name, known)}")
        self._places: dict[str, LatentWeight] = (
            known if layers is None else {name: known[name] for name in layers}
        )
        super().__init__(model, {name: each.parameter for name, each in self._places.items()})

    def quantized(self) -> Iterator[QuantizedWeight]:
        """The deployed form of the present weights, one by one."""
        for each in self._places.values():
            yield each.quantizer.quantize(each.to_rows(each.parameter))

    def dequantized(self, quantized: Iterable[QuantizedWeight]) -> Iterator[Tensor]:
        """The values of codes and scales, one weight at a time, shaped like the weights.

        Args:
            quantized: One per weight.
        """
        for each, form in zip(self._places.values(), quantized, strict=True):
            yield each.from_rows(form.dequantize())

    def deployed(self) -> Point:
        """The present weights as the quantizers deploy them."""
        return list(self.dequantized(self.quantized()))

    def in_steps(self, direction: Direction) -> Iterator[Tensor]:
        """A direction given in units of each weight's grid step, in units of the weights."""
        for each, values in zip(self._places.values(), direction, strict=True):
            yield each.from_rows(_times(each.to_rows(values), each.quantizer.effective_scale()))

    def per_step(self, direction: Direction) -> Iterator[Tensor]:
        """A direction in units of each weight's grid step: the inverse of `in_steps`."""
        for each, values in zip(self._places.values(), direction, strict=True):
            yield each.from_rows(_times(each.to_rows(values), each.quantizer.effective_scale().reciprocal()))


@dataclass(frozen=True)
class Noise:
    """A direction of standard normal numbers, the same for the same seed, shapes and device.

    Attributes:
        space: The space that it lies in.
        seed: Its seed.
    """

    space: ParameterSpace
    seed: int

    def __iter__(self) -> Iterator[Tensor]:
        """Draw weight by weight."""
        generator: torch.Generator | None = None
        for weight in self.space.weights.values():
            device = weight.device
            generator = generator or torch.Generator(device).manual_seed(self.seed)
            yield torch.randn(weight.shape, generator=generator, device=device, dtype=weight.dtype)


def dot(a: Direction, b: Direction) -> Tensor:
    """The inner product of two directions, as a scalar on their device."""
    pairs = zip(a, b, strict=True)
    return torch.stack([torch.vdot(x.flatten(), y.flatten().to(x.dtype)) for x, y in pairs]).sum()


def norm(a: Direction) -> Tensor:
    """The length of a direction, as a scalar on its device."""
    return torch.stack([x.norm() for x in a]).norm()


def _times(rows: Tensor, scale: Tensor) -> Tensor:
    """Multiply rows by the scale of their row or group."""
    return (rows.reshape(*scale.shape, -1) * scale.unsqueeze(-1)).view_as(rows)

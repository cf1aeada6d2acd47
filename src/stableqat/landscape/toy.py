"""A valley in one or two dimensions on which rounding fails and quantization-aware training recovers.

`f(x, y) = curvature y^2 / 2 + wall max(0, |y| - radius)^2 / 2 - slope x`: y lies across a flat basin with
steep walls, x along a river that descends; without x it is the valley's cross-section. The basin is
|y| <= radius. The quadratic model at a trained weight inside cannot see the wall, so both rounding to nearest
and rounding by curvature may take a level outside, although one inside is near. Descent that takes its
gradient at the rounded point (`w <- w - lr g(u) f'(Q(w))`) feels the wall and moves until Q(w) is inside.

The finite-time bound. Let s be the grid step and w the start, with Q(w) outside. Outside, `|f'|` is at least
m, its value at the nearest level outside, and at most M, its value at Q(w). So a step of SGD moves w inwards
by at least `lr g_min m` and at most `lr g_max M`. Rounding moves a point by at most s / 2: Q(w) is inside as
soon as `|y| <= radius - s / 2`. If a step cannot jump across that window, `lr g_max M <= 2 radius - s`, the
first entry is at or before step `(|y| - radius + s / 2) / (lr g_min m)`, rounded up. The bound says nothing
about what follows, and g_min, the surrogate's minimum on the way, makes it loose where g varies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian

from stableqat.errors import UserError
from stableqat.quantizers import Quantizer


@dataclass(frozen=True)
class Valley:
    """The loss of this file's docstring.

    Attributes:
        curvature: Second derivative across the basin.
        wall: Second derivative that the wall adds.
        radius: Half the basin's width.
        slope: How fast the river descends.
    """

    curvature: float = 0.02
    wall: float = 4.0
    radius: float = 1.0
    slope: float = 0.1

    def loss(self, point: Tensor) -> Tensor:
        """The loss at a point (y,) or (x, y), as a scalar."""
        y = point[-1]
        beyond = (y.abs() - self.radius).clamp(min=0)
        across = self.curvature * y.square() / 2 + self.wall * beyond.square() / 2
        return across if len(point) == 1 else across - self.slope * point[0]

    def steepness(self, y: float) -> float:
        """The absolute slope across the valley at y."""
        return self.curvature * abs(y) + self.wall * max(0.0, abs(y) - self.radius)

    def inside(self, point: Tensor) -> bool:
        """Whether a point lies in the basin."""
        return abs(point[-1].item()) <= self.radius

    def predicted(self, start: Tensor, end: Tensor) -> float:
        """The rise that the curvature at `start` alone predicts at `end`, which is what GPTQ minimises."""
        by = end - start
        return (by @ hessian(self.loss, start) @ by).item() / 2


class Toy(nn.Module):
    """A point in the valley as the weights of a model, each with a grid of the same step and fixed scale.

    Args:
        quantizer: Makes a quantizer of a weight (n, 1); its grid is an integer one.
        valley: The loss.
        start: The trained weights, (y,) or (x, y).
        step: Distance between levels.
        offset: A level of y's grid; x has a level at 0.
    """

    def __init__(
        self,
        quantizer: Callable[[Tensor], Quantizer],
        valley: Valley | None = None,
        start: tuple[float, ...] = (0.8,),
        step: float = 1.7,
        offset: float = -0.4,
    ) -> None:
        super().__init__()
        self.valley, self.step = valley or Valley(), step
        self.weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.offset = torch.zeros_like(self.weight)
        self.offset[-1] = offset
        self.quantizer = quantizer(self._row()).double().requires_grad_(False)
        for parameter, value in ((self.quantizer.scale, step), (self.quantizer.scale_floor, step * 1e-4)):
            parameter.fill_(value)

    def _row(self) -> Tensor:
        return (self.weight - self.offset)[:, None]

    def deployed(self) -> Tensor:
        """The rounded point, with the surrogate's gradient."""
        return self.quantizer(self._row())[:, 0] + self.offset

    def loss(self) -> Tensor:
        """The loss of the rounded point: what quantization-aware training descends."""
        return self.valley.loss(self.deployed())

    def latent_loss(self) -> Tensor:
        """The loss of the weights themselves: what full-precision training descends."""
        return self.valley.loss(self.weight)

    @torch.no_grad()
    def by_curvature(self) -> Tensor:
        """The rounded point of least predicted rise, among the two nearest levels of each weight."""
        below = ((self.weight - self.offset) / self.step).floor()
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(below)).view(-1, len(below))
        points = [(below + corner) * self.step + self.offset for corner in corners]
        return min(points, key=lambda point: self.valley.predicted(self.weight.detach(), point))

    def bound(self, lr: float) -> float:
        """The step at or before which SGD enters the basin, by this file's docstring; 0 if it is inside.

        Args:
            lr: The learning rate.

        Returns:
            The step; infinity where the bound does not apply, because the basin is narrower than the grid's
            step, a step may jump across it, or the surrogate vanishes on the way.
        """
        valley, half = self.valley, self.step / 2
        rounded = self.deployed().detach()
        if valley.inside(rounded):
            return 0
        start, end = self.weight[-1].item(), valley.radius - half
        window = 2 * valley.radius - self.step
        if window < 0:
            return inf
        side = 1 if start > 0 else -1
        way = torch.linspace(end, abs(start), 1001, dtype=torch.float64) * side
        position = (way - self.offset[-1]) / self.step
        level = position.round()
        factor, _ = self.quantizer.surrogate.derivatives(position - level, self._surrogate_param())
        factor = torch.ones_like(way) if factor is None else factor
        outside = (level * self.step + self.offset[-1]).abs()
        least = valley.steepness(outside[outside > valley.radius].min().item())
        most = valley.steepness(rounded[-1].item())
        if lr * factor.max().item() * most > window or factor.min() <= 0:
            return inf
        return ceil((abs(start) - end) / (lr * factor.min().item() * least))

    def _surrogate_param(self) -> Tensor | None:
        param = self.quantizer.surrogate_param()
        return None if param is None else param[-1]


@dataclass(frozen=True)
class Descent:
    """Where a descent has been, with the start as step 0.

    Attributes:
        latent: Weights, (steps + 1, n).
        deployed: Rounded weights, (steps + 1, n).
        entry: First step whose rounded point is in the basin; None if none is.
    """

    latent: Tensor
    deployed: Tensor
    entry: int | None


def descend(
    toy: Toy, optimizer: torch.optim.Optimizer, steps: int, loss: Callable[[], Tensor] | None = None
) -> Descent:
    """Train a toy in place.

    Args:
        toy: The toy.
        optimizer: An optimizer of its weight.
        steps: Number of steps, at least 1.
        loss: What to descend: `toy.loss`, the default, or `toy.latent_loss`.

    Raises:
        UserError: If there are no steps to take.
    """
    if steps < 1:
        raise UserError(f"steps: must be at least 1, not {steps}")
    latent, deployed = [], []
    for step in range(steps + 1):
        latent.append(toy.weight.detach().clone())
        deployed.append(toy.deployed().detach())
        if step < steps:
            optimizer.zero_grad()
            (loss or toy.loss)().backward()
            optimizer.step()
    entry = next((step for step, point in enumerate(deployed) if toy.valley.inside(point)), None)
    return Descent(torch.stack(latent), torch.stack(deployed), entry)

"""Slope and curvature of the loss at the present weights: gradient, Hessian products, top eigenvectors.

The quadratic prediction along a direction d is `f + t <g, d> + t^2 <d, H d> / 2`. H d is exact, from a second
backward pass through the gradient (Pearlmutter 1994), which needs the plain attention kernel and a loss
without quantizers: enter `full_precision(model)` first. Eigenvectors come from Lanczos' method with full
reorthogonalisation, so they take the memory of one point per step; take a space of few layers, or few steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stableqat.errors import UserError, check_range
from stableqat.landscape.space import Direction, Losses, ParameterSpace, Point, dot, norm


@torch.no_grad()
def mean_loss(losses: Losses) -> Tensor:
    """The mean of the losses at the present weights, as a scalar on their device."""
    return torch.stack([loss().float() for loss in losses]).mean()


def gradient(space: ParameterSpace, losses: Losses) -> Point:
    """The gradient of the mean loss at the present weights."""
    weights = list(space.weights.values())
    total = [torch.zeros_like(weight) for weight in weights]
    for loss in losses:
        found = torch.autograd.grad(loss(), weights, materialize_grads=True)
        torch._foreach_add_(total, found, alpha=1 / len(losses))
    return total


def hessian_product(space: ParameterSpace, losses: Losses, direction: Direction) -> Point:
    """The Hessian of the mean loss at the present weights, times a direction.

    Raises:
        UserError: If the model is quantized, as the surrogates' gradients are no function's.
    """
    if space.quantizes:
        raise UserError("a quantized model has no Hessian; measure inside full_precision(model)")
    weights, by = list(space.weights.values()), list(direction)
    total = [torch.zeros_like(weight) for weight in weights]
    for loss in losses:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            slopes = torch.autograd.grad(loss(), weights, create_graph=True, materialize_grads=True)
            along = torch.stack([(x * y).sum() for x, y in zip(slopes, by, strict=True)]).sum()
            if not along.requires_grad:  # a linear loss
                continue
            found = torch.autograd.grad(along, weights, materialize_grads=True)
        torch._foreach_add_(total, found, alpha=1 / len(losses))
    return total


class Quadratic(NamedTuple):
    """What the loss and its first two derivatives at a point predict along a direction.

    Attributes:
        loss: The loss at the point.
        slope: Its derivative along the direction.
        curvature: Its second derivative.
    """

    loss: float
    slope: float
    curvature: float

    def at(self, length: float) -> float:
        """The prediction at `length` times the direction."""
        return self.loss + length * self.slope + length**2 * self.curvature / 2


def quadratic(space: ParameterSpace, losses: Losses, direction: Direction) -> Quadratic:
    """The quadratic model of the mean loss along a direction, from the present weights."""
    by = list(direction)
    slope = dot(gradient(space, losses), by)
    curvature = dot(hessian_product(space, losses, by), by)
    numbers = torch.stack([mean_loss(losses), slope.float(), curvature.float()])
    return Quadratic(*numbers.tolist())


class Eigenpair(NamedTuple):
    """An eigenvector of the Hessian.

    Attributes:
        value: Its eigenvalue.
        vector: Unit direction.
        residual: Length of `H v - value v`: no more than this does the value differ from an eigenvalue.
    """

    value: float
    vector: Point
    residual: float


def top_eigenvectors(
    space: ParameterSpace, losses: Losses, count: int = 1, *, steps: int = 20, seed: int = 0
) -> list[Eigenpair]:
    """The eigenvectors of the largest eigenvalues of the Hessian at the present weights.

    Args:
        space: The weights.
        losses: The loss.
        count: How many; fewer return from a space that has fewer dimensions.
        steps: Hessian products, at least `count`; more are more exact.
        seed: Of the direction to start from.

    Returns:
        The largest eigenvalue first.

    Raises:
        UserError: If `count` or `steps` is out of range.
    """
    check_range("count", count, 1)
    check_range("steps", steps, count)
    first = space.noise(seed)
    basis = [_over(first, norm(first))]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = hessian_product(space, losses, basis[-1])
        diagonal.append(dot(image, basis[-1]).item())
        for _ in range(2):  # once leaves an error of rounding
            for each in basis:
                torch._foreach_sub_(image, torch._foreach_mul(each, dot(image, each)))
        beside.append(norm(image).item())
        if len(diagonal) == min(steps, space.size) or beside[-1] <= 1e-6 * max(map(abs, diagonal)):
            break
        basis.append(_over(image, norm(image)))
    inner = torch.tensor(beside[:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(matrix + torch.diag(inner, 1) + torch.diag(inner, -1))
    found = []
    for place in reversed(range(max(len(values) - count, 0), len(values))):
        mix = vectors[:, place].tolist()
        vector = [torch.zeros_like(x) for x in basis[0]]
        for share, each in zip(mix, basis, strict=True):
            torch._foreach_add_(vector, each, alpha=share)
        found.append(Eigenpair(values[place].item(), vector, abs(beside[-1] * mix[-1])))
    return found


def _over(direction: Direction, length: Tensor) -> Point:
    return [each / length for each in direction]

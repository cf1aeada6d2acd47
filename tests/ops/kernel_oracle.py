"""What the fused kernels must return, in float64, and how far from it they may be.

What is decided is decided in float32: a weight's code and whether the mask lets it through follow from the
IEEE quotient `v = x / s`. Everything else (distances, surrogate, sums) is float64. The limits:

- weight gradient: 2e-6 of the upstream gradient, plus one unit in the last place of a 16-bit result;
- gradients of scale and parameter: 1e-6 of the sum of their terms' magnitudes, where a weight's terms are
  `grad * (q - z) * grad_scale` and `grad * v * grad_scale`, and for DSQ's parameter the derivatives of the
  two factors of `tanh(k t) / (1 - a)`, in both of which `t` is the difference of `|u|` and 1/2. A pair may
  cancel, so the magnitudes of both count.
"""

from dataclasses import dataclass
from math import pi, prod, sqrt

import torch
from torch import Tensor

from stableqat.ops import Constant, Fourier, Grid, Surrogate, Tanh, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """The inputs of one call of the kernels."""

    x: Tensor
    upstream: Tensor
    scale: Tensor
    floor: Tensor | None
    param: Tensor | None
    grid: Grid
    surrogate: Surrogate

    @property
    def acting_scale(self) -> Tensor:
        if self.floor is None:
            return self.scale
        lifted = torch.maximum(self.scale.abs() * (self.scale * self.floor).sign(), self.floor.abs())
        return torch.where(self.floor == 0, torch.maximum(self.scale, self.floor), lifted * self.floor.sign())


def sample(shape, scale_shape, grid, surrogate, *, dtype=FLOAT, upstream=FLOAT, floor=False, seed=0):
    """Weights on all sides of every rule, one in eight at a threshold; every third scale is negative.

    A floor acts on every other scale.
    """
    random = torch.Generator(DEVICE).manual_seed(seed)

    def uniform(size, low, high):
        return torch.rand(size, generator=random, device=DEVICE).mul_(high - low).add_(low)

    scale = uniform(scale_shape, 0.02, 0.5)
    scale.view(-1)[1::3] *= -1
    v = uniform((*scale_shape, prod(shape) // prod(scale_shape)), grid.levels[0] - 1.5, grid.levels[-1] + 1.5)
    tie = v.floor().add_(grid.zero_point + 0.5)
    v = torch.where(uniform(v.shape, 0, 1) < 0.125, tie, v)
    floors = None
    x = v.mul_(scale.unsqueeze(-1)).reshape(shape).to(dtype)
    if floor:
        acts = torch.arange(scale.numel(), device=DEVICE).reshape(scale_shape) % 2 == 0
        floors = torch.where(acts, scale, scale / 2)
        scale = torch.where(acts, scale * uniform(scale_shape, -1, 1), scale)
    return Case(
        x,
        torch.randn(shape, generator=random, device=DEVICE).to(upstream),
        scale,
        floors,
        uniform(scale_shape, 0.05, 0.95).logit() if isinstance(surrogate, Tanh) else None,
        grid,
        surrogate,
    )


def expected_value(case, dtype):
    """The torch reference's value."""
    s = case.acting_scale.unsqueeze(-1)
    value = reference.forward(case.x.float().reshape(*case.scale.shape, -1), s, case.grid)
    return value.reshape(case.x.shape).to(dtype)


def surrogate_and_terms(surrogate, u, a):
    """g(u) in float64; terms of the soft value's derivative by `a`, in steps, and their magnitudes."""
    if isinstance(surrogate, Fourier):
        k = [2 * m + 1 for m in range(surrogate.harmonics)]
        s = sum((-1) ** m / k[m] * torch.cos(k[m] * pi * u) for m in range(surrogate.harmonics))
        s = s * (surrogate.amplitude * sqrt(2) * pi)
        return (1 - s) / (1 + s), None
    if isinstance(surrogate, Tanh):
        t = u - torch.where(u >= 0, 0.5, -0.5)
        k = torch.log(2 / a - 1)
        sech2 = 1 / torch.cosh(k * t) ** 2
        by_range = torch.tanh(k * t) / (2 * (1 - a) ** 2)
        by_slope = sech2 / ((1 - a) * a * (a - 2))
        parts = u.abs() + 0.5
        magnitudes = k * parts / (2 * (1 - a) ** 2) - by_slope * parts
        return sech2 * k / (2 * (1 - a)), (by_range + by_slope * t, magnitudes)
    return torch.full_like(u, surrogate.value if isinstance(surrogate, Constant) else 1.0), None


def expected_gradients(case):
    """Gradients: of weight with slack, of scale and parameter with the magnitude of their terms.

    The slack is for ties of float32: both neighbours are nearest, and the distance to either is right.
    """
    s = case.acting_scale.unsqueeze(-1)
    z = torch.full_like(s, case.grid.zero_point)
    x = case.x.float().reshape(*case.scale.shape, -1)
    v = x / s
    nearest = (v + z).round()
    low, high = case.grid.bounds(case.surrogate.mask)
    inside = (v >= low) & (v <= high)

    level = nearest.clamp(case.grid.q_min, case.grid.q_max).double() - z.double()
    tie = (v + z - nearest).abs() == 0.5
    v = x.double() / s.double()
    upstream = case.upstream.double().reshape(x.shape)
    grad_scale = 1 / sqrt(x.shape[-1] * max(case.grid.q_max, 1))
    a = None if case.param is None else case.param.double().sigmoid().unsqueeze(-1)
    u = v + z.double() - nearest.double()
    g, by_param = surrogate_and_terms(case.surrogate, u, a)
    other, _ = surrogate_and_terms(case.surrogate, u - u.sign(), a)

    def summed(weight, terms, magnitudes):
        parts = (weight * upstream * terms, (weight * upstream).abs() * magnitudes)
        return [(part * grad_scale).sum(-1).reshape(case.scale.shape) for part in parts]

    v_inside = torch.zeros_like(v) if case.grid.name == "binary" else v * inside
    by_scale = summed(torch.ones_like(v), level - v_inside, level.abs() + v_inside.abs())
    by_param = None if by_param is None else summed(inside * s.double() * a * (1 - a), *by_param)
    by_weight = upstream * g * inside
    slack = upstream.abs() * (g - other).abs() * tie
    return [part.reshape(case.x.shape) for part in (by_weight, slack)], by_scale, by_param


def last_place(x, dtype):
    """One unit in the last place of `dtype` at x."""
    digits, smallest = {BF16: (8, 2.0**-133), HALF: (11, 2.0**-24)}[dtype]
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - digits).clamp_min(smallest)


def errors(case, gradients):
    """Worst error over its limit: of weight, scale and parameter."""
    (by_weight, slack), *sums = expected_gradients(case)
    weight = gradients[0]
    assert (weight.shape, weight.dtype) == (case.x.shape, case.x.dtype)
    assert (weight[by_weight == 0] == 0).all()
    limit = 2e-6 * case.upstream.double().abs() + slack
    if weight.dtype != FLOAT:
        limit += last_place(by_weight, weight.dtype)
    worst = {"weight": ((weight.double() - by_weight).abs() / limit.clamp_min(1e-30)).max().item()}
    for name, found, expected in zip(("scale", "param"), gradients[1:], sums, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert (found.shape, found.dtype) == (case.scale.shape, FLOAT)
            total, magnitudes = expected
            limit = (1e-6 * magnitudes).clamp_min(1e-30)
            worst[name] = ((found.double() - total).abs() / limit).max().item()
    return worst

"""What the backward pass uses as the derivative of `round`, and which weights it reaches.

`round` has derivative 0 almost everywhere, so QAT puts a surrogate `g(u)` in its place, a function of `u`,
the signed distance to the nearest level in [-1/2, 1/2]: Identity (STE, Bengio et al. 2013), Fourier
(StableQAT, arXiv 2601.19320, eq. 4-10), Tanh (DSQ, Gong et al. 2019, arXiv 1908.05033). The factor on the
upstream gradient is `g(u) * mask(v)`. The trade-off: a `g` that follows the staircase closely is small near
levels, so it keeps weights still there, and shrinks the mean gradient (StableQAT at A = 0.21: 0.30). Constant
and Permuted are the controls that separate the two effects.
"""

from dataclasses import dataclass
from functools import cache
from math import cos, pi, sqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stableqat.errors import UserError, check_range
from stableqat.ops.grids import Mask

KernelName = Literal["identity", "constant", "fourier", "tanh"]


class KernelForm(NamedTuple):
    """A surrogate as the fused kernels know it: one of their formulas, with its numbers.

    Attributes:
        name: The formula, named like the surrogate below that spells it out.
        numbers: Arguments of the formula: the value for `constant`, amplitude and harmonics for `fourier`.
        learns: Whether the formula has a learned parameter, whose gradient the kernel computes, like `tanh`.
    """

    name: KernelName
    numbers: tuple[float, ...] = ()
    learns: bool = False


@dataclass(frozen=True)
class Surrogate:
    """Base of all surrogates: a subclass defines `derivative`, or `derivatives` if it learns.

    It runs in plain torch unless it declares the `kernel` that computes the same. A subclass with a
    derivative of its own does not inherit its parent's kernel.

    Attributes:
        mask: Which weights receive a gradient, see `Grid.bounds`. The same mask decides
            where the scale's gradient is the inner one.
    """

    mask: Mask = "range"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "kernel" not in own and ("derivative" in own or "derivatives" in own):
            cls.kernel = Surrogate.kernel  # type: ignore[method-assign]

    @property
    def kernel(self) -> KernelForm | None:
        """The form in which the fused kernels know this surrogate; None if they do not."""
        return None

    def derivative(self, u: Tensor, param: Tensor | None = None) -> Tensor | None:
        """The surrogate `g(u)`, elementwise; None stands for the constant 1."""
        raise NotImplementedError

    def derivatives(self, u: Tensor, param: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """`g(u)`, and the value's derivative by the learned parameter in units of the scale (or None)."""
        return self.derivative(u, param), None


@dataclass(frozen=True)
class Identity(Surrogate):
    """Straight-through: g(u) = 1."""

    kernel = KernelForm("identity")

    def derivative(self, u: Tensor, param: Tensor | None = None) -> Tensor | None:
        """See `Surrogate.derivative`."""
        return None


@cache  # every layer of a model asks for the same
def _lowest(amplitude: float, harmonics: int) -> float:
    """The least value of the Fourier surrogate."""

    def value(u: float) -> float:
        waves = sum((-1) ** m / (2 * m + 1) * cos((2 * m + 1) * pi * u) for m in range(harmonics))
        s = amplitude * sqrt(2) * pi * waves
        return (1 - s) / (1 + s)

    return min(value(i / 4096) for i in range(2049))


@dataclass(frozen=True)
class Fourier(Surrogate):
    """StableQAT's rotated, damped Fourier series of the staircase.

    Rotating the staircase by 45 degrees gives a triangle wave. Keeping its first odd harmonics, damped to
    `amplitude`, and rotating back gives `g = (1 - S) / (1 + S)`,
    `S = A sqrt(2) pi sum_m (-1)^m / (2m + 1) cos((2m + 1) pi u)`. `1 - S` cancels near a level, so `cos` is
    written as `1 - 2 sin^2` of the half angle.

    Attributes:
        amplitude: A, between 0 (which is STE) and the value at which g would vanish at a level (0.22508 with
            one harmonic, 0.239 with two).
        harmonics: Number of odd harmonics to keep, at least 1.
    """

    amplitude: float = 0.21
    harmonics: int = 1

    def __post_init__(self) -> None:
        check_range("harmonics", self.harmonics, 1)
        check_range("amplitude", self.amplitude, 0)
        low = _lowest(self.amplitude, self.harmonics)
        if not low > 0:
            raise UserError(
                f"amplitude: at {self.amplitude} with {self.harmonics} harmonic(s) the surrogate falls to "
                f"{low:.3g}, so gradients vanish or change sign; with one harmonic stay below 0.225"
            )

    @property
    def kernel(self) -> KernelForm:
        """See `Surrogate.kernel`."""
        return KernelForm("fourier", (self.amplitude, self.harmonics))

    def derivative(self, u: Tensor, param: Tensor | None = None) -> Tensor:
        """See `Surrogate.derivative`."""
        weight = self.amplitude * sqrt(2) * pi
        peak = 0.0  # S at a level
        below = None  # 1 - S
        for m in range(self.harmonics):
            k, c = 2 * m + 1, weight * (-1) ** m / (2 * m + 1)
            term = (u * (k * pi / 2)).sin_().square_().mul_(2 * c)
            below = term if below is None else below.add_(term)
            peak += c
        assert below is not None
        below.add_(1 - peak)
        return below.div_(2 - below)


@dataclass(frozen=True)
class Tanh(Surrogate):
    """DSQ's soft staircase with a learned sharpness `a` in (0, 1); small `a` is a sharp step.

    The logit of `a` is learned, so that `a` stays inside by construction; beyond +-10, where `a` is within
    5e-5 of an end, the logit acts as +-10.

    Between two levels the soft value is the midpoint plus `phi / 2`, `phi = tanh(k t) / (1 - a)`,
    where `t = u - sign(u) / 2` is the distance to the nearest threshold and
    `k = ln(2 / a - 1)`, so that `phi` meets the levels exactly and g has mean 1 over the bin.

    Attributes:
        a: Where the learned `a` starts.
    """

    a: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.a < 1:
            raise UserError(f"a: must lie between 0 and 1, not {self.a}")

    kernel = KernelForm("tanh", learns=True)

    def derivative(self, u: Tensor, param: Tensor | None = None) -> Tensor:
        """See `Surrogate.derivative`; `param` is the logit of `a`, broadcastable to `u`."""
        return self.derivatives(u, param)[0]

    def derivatives(self, u: Tensor, param: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Surrogate.derivatives`: g, and half of `d phi / d logit(a)`."""
        assert param is not None
        param = param.clamp(-10, 10)
        a, rest = param.sigmoid(), (-param).sigmoid()  # rest = 1 - a, with all its digits
        k = (2 * rest / a).log1p_()  # ln(2 / a - 1)
        # at u = 0 the thresholds on both sides are equally far: either sign is right, sign(0) = 0 is not
        t = u - torch.copysign(u.new_tensor(0.5), u)
        upper = (t * (2 * k)).sigmoid_()  # (1 + tanh(k t)) / 2, at a fifth of a tanh's cost on a CPU
        sech2 = (1 - upper).mul_(upper).mul_(4)
        by_param = upper.sub_(0.5).mul_(a / rest)
        by_param.sub_(t.mul_(sech2).mul_(1 / (2 - a)))
        return sech2.mul_(k / (2 * rest)), by_param


@dataclass(frozen=True)
class Constant(Surrogate):
    """Control: g(u) = `value`, a smaller gradient of no particular shape.

    Attributes:
        value: The factor; 0.3025 is StableQAT's mean at A = 0.21.
    """

    value: float = 0.3025

    @property
    def kernel(self) -> KernelForm:
        """See `Surrogate.kernel`."""
        return KernelForm("constant", (self.value,))

    def derivative(self, u: Tensor, param: Tensor | None = None) -> Tensor:
        """See `Surrogate.derivative`."""
        return torch.full_like(u, self.value)


@dataclass(frozen=True)
class Permuted(Fourier):
    """Control: StableQAT's factors shuffled among the weights that share a scale (no link to u)."""

    def derivative(self, u: Tensor, param: Tensor | None = None) -> Tensor:
        """See `Surrogate.derivative`."""
        return super().derivative(u).gather(-1, torch.rand_like(u).argsort(-1))


def of_kernel(kernel: KernelForm, mask: Mask) -> Surrogate:
    """The surrogate in plain torch that a kernel computes.

    Args:
        kernel: The kernel's form.
        mask: Which weights receive a gradient.

    Raises:
        UserError: If there is no such kernel.
    """
    kinds = {"identity": Identity, "constant": Constant, "fourier": Fourier, "tanh": Tanh}
    if kernel.name not in kinds:
        known = ", ".join(kinds)
        raise UserError(f"surrogate: there is no kernel {kernel.name!r}; declare one of {known}, or None")
    return kinds[kernel.name](mask, *kernel.numbers)

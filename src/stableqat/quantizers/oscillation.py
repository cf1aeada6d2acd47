"""Against oscillation: dampening and iterative freezing, for any method.

Nagel et al. 2022 (arXiv 2203.11086). Where the best value lies between two levels, the gradient at one level
drives a weight to the other and back again: its code flips to and fro. Dampening draws latent weights to
their levels by a penalty that grows during training. Freezing counts how often each code flips back, and
keeps those that do so too often at their average code. Both need a latent weight and its codes only, so they
go with any grid and any surrogate. The trade-off: what is drawn or frozen learns no more, so both start weak.
"""

from dataclasses import replace
from math import cos, pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stableqat.quantizers.shard import local

if TYPE_CHECKING:
    from stableqat.quantizers.base import Quantizer

MOMENTUM = 0.01  # of the averages over steps
FIRST_THRESHOLD = 0.1
_FROZEN = 2.0  # stands for the frequency of a frozen weight, which no frequency reaches


def half_cosine(first: float, last: float, progress: float) -> float:
    """From `first` to `last` over training, slow at both ends."""
    return last + (first - last) * (1 + cos(pi * progress)) / 2


def dampening(quantizer: "Quantizer", weight: Tensor) -> Tensor:
    """The penalty `lambda * sum (w_q - clip(w))^2`, with lambda on a half cosine from 0 to its end value.

    `w_q` is a constant and `clip` ends at the outermost levels, so the gradient is `-2 lambda (w_q - w)`
    between these, 0 beyond, and none reaches the scale.

    Args:
        quantizer: Its `dampening` is the end value of lambda.
        weight: This process's shard of the layer's weight, with gradients.
    """
    grid, scale = quantizer.grid, quantizer.effective_scale().unsqueeze(-1)
    latent = local(quantizer.latent(weight)).reshape(*scale.shape[:2], -1)
    inside = (latent / scale).clamp(grid.levels[0], grid.levels[-1])
    nearest = (inside + grid.zero_point).round() - grid.zero_point
    strength = half_cosine(0.0, quantizer.dampening, quantizer.progress)
    return strength * (scale * (nearest - inside)).square().sum()


class Freezing(nn.Module):
    """Iterative freezing of one weight, and what it knows of each of its elements, 6 bytes.

    An oscillation is a change of a code against the direction of its last change; its frequency is an
    average over steps. Above a threshold, which falls on a half cosine from 0.1 to `threshold`, the code is
    frozen at the average code, for good. From then on each step puts the latent weight on that level, which
    follows the scale, so what `quantize` returns stays what is deployed.

    Args:
        threshold: End value of the threshold.
        weight: The latent weight, `(out, ...)`, for its shape and device.
    """

    def __init__(self, threshold: float, weight: Tensor) -> None:
        super().__init__()
        self.threshold = threshold
        # frozen parameters, not buffers: FSDP shards them row by row together with the weight
        for name, dtype in {
            "code": torch.int8,
            "direction": torch.int8,  # of the last change: 1, -1, or 0 before the first
            "frequency": torch.float16,
            "offset": torch.float16,  # from the code to the average code: small, as float16 wants it
        }.items():
            state = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            self.register_parameter(name, nn.Parameter(state, requires_grad=False))

    @property
    def frozen(self) -> Tensor:
        """Which elements of this process's shard are frozen."""
        return local(self.get_parameter("frequency")) > 1

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything."""
        for state in self.parameters():
            state.zero_()

    @torch.no_grad()
    def begin(self, quantizer: "Quantizer", weight: Tensor) -> None:
        """Start counting from a weight; what is known of elements that have the code they had is kept.

        Args:
            quantizer: The weight's quantizer.
            weight: This process's shard of the layer's weight.
        """
        codes = quantizer.quantize(weight).codes
        code, *others = self._state()
        for state in others:
            state.masked_fill_(codes != code, 0)
        code.copy_(codes)

    @torch.no_grad()
    def step(self, quantizer: "Quantizer", weight: Tensor, progress: float) -> None:
        """Count the oscillations of a step, freeze, and put what is frozen on its level.

        Args:
            quantizer: The weight's quantizer.
            weight: This process's shard of the layer's weight, changed in place.
            progress: Share of training that is done, including this step.
        """
        quantized = quantizer.quantize(weight)
        threshold = half_cosine(max(FIRST_THRESHOLD, self.threshold), self.threshold, progress)
        codes, frozen = self.count(quantized.codes, threshold)
        levels = replace(quantized, codes=codes).dequantize()
        quantizer.set_latent(weight, torch.where(frozen, levels, local(quantizer.latent(weight))))

    @torch.no_grad()
    def count(self, codes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Count the oscillations of a step, and freeze.

        Args:
            codes: Codes after the step, int8.
            threshold: Frequency above which a code is frozen.

        Returns:
            Codes, with the frozen ones in place of theirs, and which these are.
        """
        code, direction, frequency, offset = self._state()
        frozen = frequency > 1
        codes = torch.where(frozen, code, codes)
        change = codes.short() - code  # across an 8-bit grid it does not fit into int8
        way = change.sign().to(torch.int8)
        frequency.lerp_((way * direction < 0).to(frequency.dtype), MOMENTUM)
        direction.copy_(torch.where(way == 0, direction, way))
        offset.sub_(change).mul_(1 - MOMENTUM)
        frozen = frequency > threshold
        code.copy_(torch.where(frozen, codes + offset.round(), codes))
        offset.masked_fill_(frozen, 0)  # so a frozen code stays
        frequency.masked_fill_(frozen, _FROZEN)
        return code, frozen

    def _state(self) -> list[Tensor]:
        return [local(state) for state in self.parameters()]

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"threshold={self.threshold}"

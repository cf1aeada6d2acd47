"""Controls for where the gradient is taken: is it the deployed weights that make training recover?

Quantization-aware training takes the gradient at Q(w), where the loss of the deployed model is. In training,
these quantizers compute with another point and pass its gradient on as `STE` does, mask and scale included,
so that nothing else changes. In evaluation, and deployed, each is Q(w): validation losses are comparable,
training losses are those of the other point. The trade-off: their forward is plain torch and is never held.
"""

from typing import Any

import torch
from torch import Tensor

from stableqat import ops
from stableqat.ops import Identity, Mask
from stableqat.quantizers.base import Quantizer


class STEAtWeight(Quantizer):
    """The gradient at the latent weight itself: what full-precision training takes.

    Args:
        weight: The latent weight, `(out, ...)`.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    is_control = True

    def __init__(self, weight: Tensor, *, mask: Mask = "range", **kwargs: Any) -> None:
        super().__init__(weight, surrogate=Identity(mask), **kwargs)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize a weight; in training, the value is that of the other point."""
        deployed = super().forward(weight)
        if not self.training:
            return deployed
        return _at(weight, deployed)


class STEAtRandomRounding(Quantizer):
    """The gradient at w rounded up or down at random, with the odds that keep its mean.

    Args:
        weight: The latent weight, `(out, ...)`.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    is_control = True

    def __init__(self, weight: Tensor, *, mask: Mask = "range", **kwargs: Any) -> None:
        super().__init__(weight, surrogate=Identity(mask), **kwargs)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize a weight; in training, the value is that of the other point."""
        deployed = super().forward(weight)
        if not self.training:
            return deployed
        # rounding to nearest after noise spread evenly over one step
        scale = self.effective_scale()
        dither = torch.rand(weight.shape, dtype=scale.dtype, device=scale.device).sub_(0.5)
        rows = dither.reshape(*scale.shape, -1) * scale.unsqueeze(-1)
        moved = weight.detach() + rows.view_as(weight)
        return _at(ops.fake_quantize(moved, scale, grid=self.grid, surrogate=self.surrogate), deployed)


class STEAtNoise(Quantizer):
    """The gradient at w plus normal noise as long as the rounding error of each row or group.

    Args:
        weight: The latent weight, `(out, ...)`.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    is_control = True

    def __init__(self, weight: Tensor, *, mask: Mask = "range", **kwargs: Any) -> None:
        super().__init__(weight, surrogate=Identity(mask), **kwargs)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize a weight; in training, the value is that of the other point."""
        deployed = super().forward(weight)
        if not self.training:
            return deployed
        groups, start = (*self.scale.shape, -1), weight.detach()
        error = (deployed.detach().to(start.dtype) - start).reshape(groups)
        noise = torch.randn_like(start).reshape(groups)
        length = error.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return _at(start + (noise * length).view_as(start), deployed)


def _at(point: Tensor, deployed: Tensor) -> Tensor:
    """The value of a point with the gradients of a fake-quantized weight."""
    return point.detach().to(deployed.dtype) + (deployed - deployed.detach())  # which adds 0

"""Controls for where the gradient is taken: is it the deployed weights that make training recover?

Quantization-aware training takes the gradient at Q(w), where the loss of the deployed model is. In training,
these quantizers compute with another point and pass its gradient on as `STE` does, mask and scale included,
so that nothing else changes. In evaluation, and deployed, each is Q(w): validation losses are comparable,
training losses are those of the other point. The trade-off: their forward is plain torch and is never held.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from stableqat import ops
from stableqat.quantizers.ste import STE


class _Elsewhere(nn.Module):
    is_control = True

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize a weight; in training, the value is that of the other point."""
        deployed = super().forward(weight)
        if not self.training:
            return deployed
        point = self.point(weight.detach(), deployed.detach())
        return point.to(deployed.dtype) + (deployed - deployed.detach())  # whose gradients it has, and adds 0

    @abstractmethod
    def point(self, weight: Tensor, deployed: Tensor) -> Tensor:
        """Where the gradient is taken.

        Args:
            weight: The latent weight.
            deployed: Its deployed value.
        """


class STEAtWeight(_Elsewhere, STE):
    """The gradient at the latent weight itself: what full-precision training takes.

    Args:
        weight: The latent weight, `(out, ...)`.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    def point(self, weight: Tensor, deployed: Tensor) -> Tensor:
        """See `_Elsewhere.point`."""
        return weight


class STEAtRandomRounding(_Elsewhere, STE):
    """The gradient at w rounded up or down at random, with the odds that keep its mean.

    Args:
        weight: The latent weight, `(out, ...)`.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    def point(self, weight: Tensor, deployed: Tensor) -> Tensor:
        """See `_Elsewhere.point`: rounding to nearest after noise spread evenly over one step."""
        scale = self.effective_scale()
        dither = torch.rand(weight.shape, dtype=scale.dtype, device=scale.device).sub_(0.5)
        moved = weight + (dither.reshape(*scale.shape, -1) * scale.unsqueeze(-1)).view_as(weight)
        return ops.fake_quantize(moved, scale, grid=self.grid, surrogate=self.surrogate)


class STEAtNoise(_Elsewhere, STE):
    """The gradient at w plus normal noise as long as the rounding error of each row or group.

    Args:
        weight: The latent weight, `(out, ...)`.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    def point(self, weight: Tensor, deployed: Tensor) -> Tensor:
        """See `_Elsewhere.point`."""
        groups = (*self.scale.shape, -1)
        error = (deployed.to(weight.dtype) - weight).reshape(groups)
        noise = torch.randn_like(weight).reshape(groups)
        length = error.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return weight + (noise * length).view_as(weight)

"""The first layer of a vision transformer as a linear layer, so that it can be quantized like any other.

A patch embedding is a convolution whose stride is its kernel: no two patches share a pixel, and each patch
goes through one matrix. Cutting the image into patches and multiplying them with the flattened kernel is the
same map, with the same parameter under the same name, flattened to `(width, channels * height * width)`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stableqat.errors import UserError
from stableqat.quantizers import STE, Quantizer, QuantizerFactory, QuantizerSpec

WEIGHT = "patch_embed.proj.weight"


def with_ends(quantizer: QuantizerSpec, bits: int) -> dict[str, QuantizerFactory | None]:
    """Add the first and the last layer to what is quantized.

    Args:
        quantizer: Makes the quantizers of the other layers.
        bits: Width of both, by the same method; by STE beside a mapping.
    """
    parts = [quantizer.func, *quantizer.args] if isinstance(quantizer, partial) else [quantizer]
    named = (each for each in parts if isinstance(each, type) and issubclass(each, Quantizer))
    ends = partial(next(named, STE), bits=bits)
    others = quantizer if isinstance(quantizer, Mapping) else {"*": quantizer}
    return {WEIGHT.removesuffix(".weight"): ends, "head*": ends, **others}


def make_linear(model: Any) -> None:
    """Turn the patch embedding's convolution into a linear layer, in place.

    Args:
        model: Vision transformer of timm, on any device.

    Raises:
        UserError: If its first layer is another one.
    """
    convolution = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(convolution, nn.Conv2d) or not _cuts_patches(convolution):
        raise UserError(
            f"model.first_last_bits: the first layer of {type(model).__name__} is no convolution whose "
            "stride is its kernel; leave it out, or map quantizers to layers with model.quantizer"
        )
    channels, (height, width) = convolution.in_channels, convolution.kernel_size
    with torch.device("meta"):
        linear = nn.Linear(channels * height * width, convolution.out_channels, convolution.bias is not None)
    linear.weight = nn.Parameter(convolution.weight.detach().flatten(1))
    linear.bias = convolution.bias  # type: ignore[assignment]
    linear.register_forward_pre_hook(partial(_cut, height, width))
    linear.register_forward_hook(_channels_first)
    model.patch_embed.proj = linear.train(convolution.training)


def _cuts_patches(convolution: nn.Conv2d) -> bool:
    plain = convolution.groups == 1 and convolution.dilation == (1, 1) and convolution.padding in (0, (0, 0))
    return plain and convolution.stride == convolution.kernel_size


def _cut(height: int, width: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """`(batch, channels, rows, columns)` images to `(batch, down, across, channels * height * width)`."""
    images = inputs[0]
    batch, channels, down, across = *images.shape[:2], images.shape[2] // height, images.shape[3] // width
    images = images[..., : down * height, : across * width]
    patches = images.reshape(batch, channels, down, height, across, width).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, down, across, channels * height * width)


def _channels_first(_: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
    return patches.permute(0, 3, 1, 2)

"""Rounds a model layer by layer, each against what flows into it once the blocks before are rounded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stableqat.errors import UserError
from stableqat.evaluate.processes import Share
from stableqat.layers.linear import QuantLinear
from stableqat.ptq.gptq import Rounded, output_error
from stableqat.ptq.moments import Moments
from stableqat.ptq.stream import Block, Stream
from stableqat.quantizers import Quantizer

Method = Callable[[Tensor, Tensor, Quantizer], Rounded]
"""Rounds a latent weight, given the Hessian of its output's error and its quantizer with scales."""


@dataclass(frozen=True)
class LayerRecord:
    """What rounding did to a layer.

    Attributes:
        name: The layer.
        error: Squared error of its output, relative to the output's square.
        nearest: The same for rounding to nearest.
        inputs: Number of its inputs.
        rows: How many input vectors calibrated it.
        unseen: Number of inputs that were 0 in all of the calibration data.
        damping: Share of the mean diagonal that was added to the Hessian.
    """

    name: str
    error: float
    nearest: float
    inputs: int
    rows: int
    unseen: int
    damping: float


def nearest(weight: Tensor, hessian: Tensor, quantizer: Quantizer) -> Rounded:
    """The method that rounds to nearest."""
    made = quantizer.quantize(weight)
    error = output_error(weight.float() - made.dequantize().float(), hessian)
    return Rounded(made, error, error, int((hessian.diagonal() == 0).sum()), 0.0)


def round_block(
    block: Block, stream: Stream, method: Method, share: Share, *, bias_correction: bool = False
) -> list[LayerRecord]:
    """Round the quantized layers of a block; weights, scales and biases are set in place.

    A layer that calibration never reaches is rounded to nearest, and has no record.

    Args:
        block: The block.
        stream: The calibration data that flows into it.
        method: How a layer is rounded.
        share: This process's share of the calibration data.
        bias_correction: Add to each bias what rounding takes from the output's mean.

    Raises:
        UserError: If the inputs of a layer are not finite.
    """
    records = []
    moments = moments_of(block, stream, share)
    for name, layer in block.layers.items():
        if name in moments:
            records.append(_round(name, layer, moments[name], method, bias_correction))
            for tensor in layer.parameters():
                share.broadcast(tensor.detach())  # devices may differ in a last digit
    return records


def _round(
    name: str, layer: QuantLinear, moments: Moments, method: Method, bias_correction: bool
) -> LayerRecord:
    quantizer, hessian = layer.weight_quantizer, moments.hessian
    latent = quantizer.latent(layer.weight).detach().clone()
    made = method(latent, hessian, quantizer)
    quantizer.settle(layer.weight, made.weight)
    if bias_correction and layer.bias is not None:
        layer.bias.data += (latent - made.weight.dequantize()).float() @ moments.mean
    whole = max(output_error(latent.float(), hessian), torch.finfo(torch.float32).tiny)
    return LayerRecord(
        name=name,
        error=made.error / whole,
        nearest=made.nearest / whole,
        inputs=len(hessian),
        rows=moments.rows,
        unseen=made.unseen,
        damping=made.damping,
    )


def moments_of(block: Block, stream: Stream, share: Share) -> dict[str, Moments]:
    """The moments of what flows into each layer of a block; layers that share an input share them.

    Args:
        block: The block.
        stream: The calibration data that flows into it.
        share: This process's share of the calibration data.

    Returns:
        By layer; one that the data never reaches is missing.

    Raises:
        UserError: If the inputs of a layer are not finite.
    """
    moments: dict[str, Moments] = {}
    for activations in stream.inputs(block):
        for x, names in activations.items():
            first = moments.get(names[0]) or Moments(x.shape[-1], x.device)
            first.add(x)
            moments.update(dict.fromkeys(names, first))
    for each in dict.fromkeys(moments.values()):
        each.total(share)
    for name, each in moments.items():
        if not torch.isfinite(each.hessian).all():
            raise UserError(
                f"data: {name}: its inputs are not finite on the calibration data; look for NaN in the "
                "model, or take other data"
            )
    return moments

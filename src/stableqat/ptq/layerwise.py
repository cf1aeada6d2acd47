"""Rounds a model layer by layer, each against what flows into it once the blocks before are rounded."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stableqat.errors import UserError
from stableqat.layers.linear import quantized_layers
from stableqat.modules import QATModule
from stableqat.ptq.calibration import Batch, BlockInputs, block_inputs
from stableqat.ptq.gptq import Rounded, SecondMoment
from stableqat.quantizers import Quantizer

logger = logging.getLogger(__name__)

Method = Callable[[Tensor, Tensor, Quantizer], Rounded]
"""Rounds a latent weight, given its second moment and its quantizer with scales."""


@dataclass(frozen=True)
class LayerRecord:
    """What rounding did to a layer.

    Attributes:
        name: The layer.
        error: Squared error of its output, relative to the output's square.
        nearest: The same for rounding to nearest.
        unseen: Number of inputs that were 0 in all of the calibration data.
        damping: Share of the mean diagonal that was added to the second moment.
    """

    name: str
    error: float
    nearest: float
    unseen: int
    damping: float


def round_layers(
    module: QATModule, batches: Sequence[Batch], device: torch.device, method: Method
) -> list[LayerRecord]:
    """Round every quantized layer of the module's blocks; weights and scales are set in place.

    Layers outside of the blocks are rounded to nearest.

    Args:
        module: The configured training system, in evaluation mode.
        batches: Calibration data, as arguments of the model's forward.
        device: Where blocks run.
        method: How a layer is rounded.

    Raises:
        UserError: If a layer's inputs are not finite, or say too little.
    """
    assert module.model is not None
    records: list[LayerRecord] = []
    for inputs in block_inputs(module.model, module.blocks(module.model), batches, device):
        moments = _moments(inputs)
        for name, layer in inputs.layers.items():
            if name not in moments:
                logger.warning("%s: calibration never reaches it; it is rounded to nearest", name)
                continue
            quantizer, hessian = layer.weight_quantizer, moments[name]
            latent = quantizer.latent(layer.weight).detach()
            try:
                made = method(latent, hessian, quantizer)
            except ValueError as error:
                raise UserError(f"data: {name}: {error}") from error
            quantizer.settle(layer.weight, made.weight)
            whole = float(((latent.float() @ hessian) * latent.float()).sum())
            record = LayerRecord(name, made.error / whole, made.nearest / whole, made.unseen, made.damping)
            records.append(record)
    reached = {record.name for record in records}
    if left := [name for name in quantized_layers(module.model) if name not in reached]:
        logger.warning("rounded to nearest: %s", ", ".join(left))
    return records


def _moments(inputs: BlockInputs) -> dict[str, Tensor]:
    """The second moment of what flows into each layer; layers that share an input share it."""
    moments: dict[str, SecondMoment] = {}
    for activations in inputs.activations():
        for x, names in activations.items():
            first = moments.get(names[0]) or SecondMoment(x.shape[-1], x.device)
            first.add(x)
            moments.update(dict.fromkeys(names, first))
    values = {moment: moment.value for moment in set(moments.values())}
    return {name: values[moment] for name, moment in moments.items()}

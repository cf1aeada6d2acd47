"""Calibration: set the scales of input quantizers from what flows into layers and into attention."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from stableqat import ops
from stableqat.errors import UserError
from stableqat.quantizers.inputs import InputQuantizer, input_quantizers

Batch = TypeVar("Batch")


class _Counter(nn.Module):
    """Stands in for an input quantizer: counts what flows in and leaves it as it is."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.counts = torch.zeros(ops.BINS, dtype=torch.int64, device=device)

    def forward(self, input: Tensor) -> Tensor:
        self.counts += ops.count_values(input)
        return input


def uncalibrated(model: nn.Module) -> dict[str, InputQuantizer]:
    """The input quantizers whose parameters are not set, by name."""
    return {name: quantizer for name, quantizer in input_quantizers(model).items() if not quantizer.is_set}


@torch.no_grad()
def calibrate_inputs(model: nn.Module, batches: Iterable[Batch], run: Callable[[Batch], object]) -> int:
    """Set the input quantizers that are not set, each to the least squared error over all batches.

    While batches run, weights are quantized and inputs are not. Every process gets the same scales: their
    counts are added up.

    Args:
        model: A model with quantized layers, in evaluation mode.
        batches: Calibration batches, as many in each process.
        run: Runs the model on a batch.

    Returns:
        The number of quantizers that were set.

    Raises:
        UserError: If what flows into a layer gives no scale; names the layer, or the operand of attention.
    """
    left = uncalibrated(model)
    if not left:
        return 0
    counters = {name: _Counter(next(made.parameters()).device) for name, made in left.items()}
    try:
        for name, counter in counters.items():
            model.set_submodule(name, counter)
        for batch in batches:
            run(batch)
    finally:
        for name, quantizer in left.items():
            model.set_submodule(name, quantizer)
    together = distributed.is_available() and distributed.is_initialized()
    for name, quantizer in left.items():
        if together:
            distributed.all_reduce(counters[name].counts)
        try:
            quantizer.calibrate(counters[name].counts)
        except UserError as error:
            place = name.removesuffix(".input_quantizer").replace(".attention_quantizer", "")
            raise UserError(f"layer {place}: {error}") from error
    return len(left)

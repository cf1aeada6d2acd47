"""Rounds a model by any method, and records what that did to its loss on the calibration data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from stableqat.errors import UserError
from stableqat.evaluate.processes import Share
from stableqat.layers.full_precision import full_precision
from stableqat.layers.linear import quantized_layers
from stableqat.modules import QATModule
from stableqat.ptq.adaround import adaround
from stableqat.ptq.gptq import gptq
from stableqat.ptq.lapq import lapq
from stableqat.ptq.layerwise import LayerRecord, Method, nearest, round_block
from stableqat.ptq.outcome import Outcome, warn
from stableqat.ptq.stream import Batch, Stream, move_outside_of_blocks
from stableqat.ptq.unfinished import Unfinished
from stableqat.terminal import progress


@dataclass(frozen=True)
class Settings:
    """How to round; `stableqat ptq` describes each."""

    method: Literal["rtn", "mse", "gptq", "adaround", "lapq"]
    damping: float
    act_order: bool
    bias_correction: bool
    steps: int
    evaluations: int

    @property
    def layerwise(self) -> Method | None:
        """How single layers are rounded against their inputs; None if they are not."""
        if self.method == "gptq":
            return partial(gptq, damping=self.damping, act_order=self.act_order)
        if self.method == "adaround":
            return partial(adaround, steps=self.steps)
        return nearest if self.bias_correction else None


def round_model(
    module: QATModule,
    batches: Sequence[Batch],
    settings: Settings,
    *,
    device: torch.device,
    share: Share,
    unfinished: Unfinished,
) -> Outcome:
    """Round a model in place.

    Args:
        module: The configured training system, on the CPU; its scales are those of rounding to nearest.
        batches: This process's calibration data.
        settings: How.
        device: Where to compute.
        share: This process's share of the calibration data.
        unfinished: What an interrupted run has left, and where this one leaves what it finishes.

    Raises:
        UserError: If the inputs of a layer are not finite, or no layer has a bias to correct.
    """
    assert module.model is not None
    layers, method = quantized_layers(module.model), settings.layerwise
    if settings.bias_correction and all(layer.bias is None for layer in layers.values()):
        raise UserError("bias_correction: no quantized layer of this model has a bias; leave it out")
    if settings.method == "lapq":
        module.to(device)  # which needs the whole model over and over
    else:
        move_outside_of_blocks(module, device)
    loss = unfinished.replayed(partial(_loss, module, batches, device, share))
    with full_precision(module.model):
        losses = {"full precision": loss()}
    losses["rounded to nearest"] = loss()
    records: list[LayerRecord] = []
    if settings.method == "lapq":
        with progress(settings.evaluations) as show:
            losses["lapq"] = lapq(layers, loss, evaluations=settings.evaluations, tell=show)
    if method is not None:
        stream = Stream(module, batches, device)
        rounded = partial(
            round_block, stream=stream, method=method, share=share, bias_correction=settings.bias_correction
        )
        with progress(len(stream.modules)) as show:
            for block in stream.blocks():
                records += unfinished.kept(block, rounded)
                show(block.number + 1, f"{settings.method}, block {block.number + 1}")
        warn(records, module, settings.damping)
        losses[settings.method] = _mean(stream.losses(), device, share)
    module.to("cpu")
    return Outcome(losses, records)


def _loss(module: QATModule, batches: Sequence[Batch], device: torch.device, share: Share) -> float:
    stream = Stream(module, batches, device)
    for _ in stream.blocks():
        pass
    return _mean(stream.losses(), device, share)


def _mean(losses: Iterable[float], device: torch.device, share: Share) -> float:
    values = list(losses)
    sums = torch.tensor([sum(values), len(values)], dtype=torch.float64, device=device)
    total, count = share.total(sums).tolist()
    return total / count

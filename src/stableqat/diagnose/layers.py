"""What rounding single layers of a block does to the model's loss, beside what is predicted."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import median
from typing import Any

import torch
from torch import Tensor

from stableqat.diagnose.fisher import Quadratic, quadratics
from stableqat.landscape.basin import LONGEST, SHORTEST, of_one_step, radius
from stableqat.landscape.curvature import mean_loss
from stableqat.landscape.space import Losses, WeightSpace, norm
from stableqat.ptq.gptq import gptq
from stableqat.ptq.moments import Moments
from stableqat.ptq.stream import Block, Stream
from stableqat.quantizers import QuantizedWeight, Quantizer, QuantizerFactory
from stableqat.surgery import make_quantizer

Record = dict[str, Any]
Rounded = dict[tuple[int, str], QuantizedWeight]
"""A layer's weight by width and method."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        factories: The quantizer of each width, the narrowest first.
        damping: Of GPTQ.
        directions: Random directions per layer, for the basin's width; 0 takes it from the curvature.
        rise: Of the loss, at which the basin ends.
        seed: Of labels that are drawn.
    """

    factories: dict[int, QuantizerFactory]
    damping: float
    directions: int
    rise: float
    seed: int


@torch.no_grad()
def round_layer(
    weight: Tensor, moments: Moments | None, settings: Settings
) -> tuple[dict[int, Quantizer], Rounded]:
    """Round a weight at every width, to nearest and by GPTQ.

    Args:
        weight: The weight.
        moments: Of the layer's inputs; None if calibration never reaches it, then both round to nearest.
        settings: The widths, and how.

    Returns:
        The quantizer of each width, and the rounded weights.
    """
    made: dict[int, Quantizer] = {}
    rounded: Rounded = {}
    hessian = None if moments is None else moments.hessian
    for bits, factory in settings.factories.items():
        made[bits] = quantizer = make_quantizer(weight, factory)
        nearest = quantizer.quantize(weight)
        rounded[bits, "rtn"] = rounded[bits, "gptq"] = nearest
        if hessian is not None:
            rounded[bits, "gptq"] = gptq(weight, hessian, quantizer, damping=settings.damping).weight
    return made, rounded


def measure_layers(
    block: Block,
    stream: Stream,
    losses: Losses,
    moments: dict[str, Moments],
    spaces: dict[str, WeightSpace],
    settings: Settings,
    tell: Callable[[int, str], None],
) -> tuple[list[Record], dict[str, Rounded]]:
    """Round each layer of a block by itself, and measure the loss.

    Args:
        block: The block, inside `full_precision`.
        stream: The held-out data that flows into it.
        losses: The loss of each held-out batch.
        moments: Of the inputs of each layer.
        spaces: The weight of each layer.
        settings: How.
        tell: Called for each layer with the number of those that are measured, and its name.

    Returns:
        A record per layer, and the rounded weights of each.
    """
    if not block.layers:
        return [], {}
    base = mean_loss(losses).item()
    found = {
        name: round_layer(each.weight, moments.get(name), settings) for name, each in block.layers.items()
    }
    errors = {
        name: torch.stack(
            [each.dequantize() - block.layers[name].weight for each in rounded.values()]
        ).detach()
        for name, (_, rounded) in found.items()
    }
    predicted = quadratics(block, stream, errors, spaces, seed=settings.seed)
    records: list[Record] = []
    for name, (quantizers, rounded) in found.items():
        tell(len(records), name)
        space = spaces[name]
        record: Record = {"name": name, "block": block.number, "weights": space.size}
        record["width"] = _width(space, losses, predicted[name], settings)
        record["settings"] = {str(bits): {"step": _step(each)} for bits, each in quantizers.items()}
        for (bits, method), slope, curvature in zip(
            rounded, predicted[name].slopes, predicted[name].curvatures, strict=True
        ):
            with space.kept():
                space.set([rounded[bits, method].dequantize()])
                rise = mean_loss(losses).item() - base
            record["settings"][str(bits)][method] = {"slope": slope, "curvature": curvature, "rise": rise}
        records.append(record)
    return records, {name: rounded for name, (_, rounded) in found.items()}


def _width(space: WeightSpace, losses: Losses, predicted: Quadratic, settings: Settings) -> float | None:
    """The basin's width, the way from one side to the other as a root mean square per weight.

    The search begins where the curvature expects the edge. None if the loss never rises that far.
    """
    expected = sqrt(2 * settings.rise / predicted.random) if predicted.random else inf
    radii, lengths = [], []
    for seed in range(max(settings.directions, 1)):
        noise = list(space.in_steps(space.noise(seed)))
        lengths.append(norm(of_one_step(space, noise)).item() / sqrt(space.size))
        first = min(max(expected * sqrt(2), 2 * SHORTEST), LONGEST)
        radii.append(
            radius(space, losses, noise, rise=settings.rise, first=first, halvings=1)
            if settings.directions
            else expected
        )
    found = 2 * median(radii) * median(lengths)
    return found if isfinite(found) else None


def _step(quantizer: Quantizer) -> float:
    """The root mean square of the distance between levels."""
    return quantizer.effective_scale().square().mean().sqrt().item()

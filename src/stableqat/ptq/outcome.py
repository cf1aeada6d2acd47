"""What rounding did to a model, and how little calibration says of some of its layers."""

import logging
from dataclasses import dataclass
from statistics import median

from stableqat.layers.experts import quantized_experts
from stableqat.layers.linear import quantized_layers
from stableqat.modules import QATModule
from stableqat.ptq.layerwise import LayerRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What rounding did to a model.

    Attributes:
        loss: On the calibration data: of full precision, of rounding to nearest, and of the method.
        layers: What it did to each layer that was rounded against its inputs.
    """

    loss: dict[str, float]
    layers: list[LayerRecord]


def in_words(outcome: Outcome) -> list[str]:
    """Loss and errors, as lines of a report."""
    lines = []
    if outcome.loss:
        losses = ", ".join(f"{loss:.4g} {what}" for what, loss in outcome.loss.items())
        lines.append(f"loss on the calibration data: {losses}")
    if shares := [layer.error / layer.nearest for layer in outcome.layers if layer.nearest]:
        lines.append(
            "squared error of a layer's output relative to rounding to nearest: "
            f"median {median(shares):.3f}, largest {max(shares):.3f}"
        )
    return lines


def kinds(module: QATModule) -> str:
    """The quantizers of a model in words."""
    assert module.model is not None
    layers = quantized_layers(module.model).values()
    return ", ".join(sorted({layer.weight_quantizer.kind_in_words for layer in layers}))


def warn(records: list[LayerRecord], module: QATModule, damping: float) -> None:
    """Name the layers that calibration says little about.

    Args:
        records: Those of the layers that were rounded against their inputs.
        module: The model.
        damping: The damping that was asked for.
    """
    assert module.model is not None
    reached = {record.name for record in records}
    layers = [*quantized_layers(module.model), *quantized_experts(module.model)]
    found = {
        "calibration never reaches it, so it is rounded to nearest": set(layers) - reached,
        "fewer input vectors than inputs; take more samples": {
            each.name for each in records if each.rows < each.inputs
        },
        "some inputs are 0 in all of the data; their weights are rounded to nearest": {
            each.name for each in records if each.unseen
        },
        "its Hessian is singular, and took more damping": {
            each.name for each in records if each.damping > damping
        },
    }
    for what, names in found.items():
        if names:
            shown = [name for name in layers if name in names]
            more = f" (and {len(shown) - 3} more)" if len(shown) > 3 else ""
            logger.warning("%s%s: %s", ", ".join(shown[:3]), more, what)

"""Rounds a model by any method, and records what that did to its loss on the calibration data."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch

from stableqat.layers.full_precision import full_precision
from stableqat.layers.linear import quantized_layers
from stableqat.modules import QATModule
from stableqat.ptq.adaround import adaround
from stableqat.ptq.calibration import Batch
from stableqat.ptq.gptq import gptq
from stableqat.ptq.lapq import lapq
from stableqat.ptq.layerwise import Method, round_layers
from stableqat.ptq.subject import Subject, calibration_batches

MOST_TOKENS = 2048
Show = Callable[[float, str], None]


@dataclass(frozen=True)
class Settings:
    """How to round; the arguments of `stableqat ptq`."""

    method: Literal["rtn", "mse", "gptq", "adaround", "lapq"]
    data: str | None
    samples: int
    block_size: int | None
    damping: float
    act_order: bool
    steps: int
    evaluations: int
    batch_size: int
    seed: int


def round_model(subject: Subject, settings: Settings, device: torch.device, show: Show) -> dict[str, Any]:
    """Round a configured model in place.

    Args:
        subject: The model; its scales are those of rounding to nearest.
        settings: How.
        device: Where to compute.
        show: Reports progress.

    Returns:
        The settings, the model `in_words`, the `loss` on the calibration data of full precision, rounding
        to nearest and the method, and the error of each of the `layers`.
    """
    module = subject.module.eval()
    assert module.model is not None
    kinds = {layer.weight_quantizer.kind_in_words for layer in quantized_layers(module.model).values()}
    record = asdict(settings) | {"in_words": f"{settings.method}, {', '.join(sorted(kinds))}"}
    if settings.data is None:
        return record
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", MOST_TOKENS)
    batches = calibration_batches(
        subject,
        settings.data,
        samples=settings.samples,
        block_size=settings.block_size or min(MOST_TOKENS, limit),
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    module.to(device)
    loss = partial(_loss, module, batches, device)
    with full_precision(module.model):
        losses = {"full precision": loss()}
    losses["rounded to nearest"] = loss()
    if settings.method == "lapq":
        layers = quantized_layers(module.model)
        tell = partial(show, 0)
        lapq(layers, loss, evaluations=settings.evaluations, tell=tell)
    elif settings.method in ("gptq", "adaround"):
        method: Method = partial(gptq, damping=settings.damping, act_order=settings.act_order)
        if settings.method == "adaround":
            method = partial(adaround, steps=settings.steps)
        inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
        record["layers"] = [asdict(each) for each in round_layers(module, inputs, device, method)]
    if settings.method not in ("rtn", "mse"):
        losses[settings.method] = loss()
    module.to("cpu")
    return record | {"loss": losses}


@torch.no_grad()
def _loss(module: QATModule, batches: Sequence[Batch], device: torch.device) -> float:
    total = sum(module.loss({k: v.to(device) for k, v in batch.items()}).item() for batch in batches)
    return total / len(batches)

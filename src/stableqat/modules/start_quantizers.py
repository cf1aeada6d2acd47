"""`init_quantizers: start`: a run starts with the quantizers of the run or checkpoint that `init_from` names.

A second phase, or training after calibration, then starts with exactly the loss that its start deploys: where
a layer's quantizer has the same grid and scale shape, all of its parameters are taken bit for bit. Where they
differ, from 4 to 2 bits for example, the latent weight becomes the value that the start deploys, and the
scale is set from it: what rounded differently before is lost, and what is left was trained.
"""

import logging
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stableqat.errors import UserError, counted
from stableqat.layers.linear import QuantLinear, quantized_layers
from stableqat.modules.start import Start
from stableqat.quantizers import Quantizer
from stableqat.quantizers.inputs import input_quantizers
from stableqat.surgery import quantize_linears

if TYPE_CHECKING:
    from stableqat.modules.base import QATModule

logger = logging.getLogger(__name__)


def check_quantizers(module: "QATModule", start: Start | None) -> None:
    """Refuse a start whose quantizers cannot be taken, before data is prepared.

    Raises:
        UserError: As `start_quantizers`.
    """
    with torch.device("meta"):
        model = module.build_model()
    if module.quantizer is not None:
        quantize_linears(model, module.quantizer, module.skip)
    start_quantizers(model, start)


def start_quantizers(model: nn.Module, start: Start | None) -> dict[str, QuantLinear]:
    """The quantized layers of a model's start, their quantizers trained and on the CPU, without weights.

    Args:
        model: The model with its own quantizers, on any device.
        start: What it starts from.

    Raises:
        UserError: If the start, or in it one of the model's quantized layers, has no quantizer.
    """
    key, remedy = "model.init_quantizers: start", "take init_quantizers: weights"
    if start is None or start.checkpoint is None:
        what = "init_from is missing" if start is None else f"{start.source} is not a run or checkpoint"
        raise UserError(f"{key}, but {what}; name a quantized run as model.init_from, or {remedy}")
    source = start.source
    try:
        layers = start.layers
    except UserError as error:
        raise UserError(f"{error}; model.init_quantizers: start needs them; {remedy}") from error
    if not layers:
        raise UserError(f"{key}, but {source} was trained without quantizers; {remedy}")
    if lost := [name for name in quantized_layers(model) if name not in layers]:
        raise UserError(
            f"{key}, but layer {lost[0]} has no quantizer in {source}; add it to model.skip, or {remedy}"
        )
    return layers


@torch.no_grad()
def take_quantizers(model: nn.Module, start: Start | None) -> None:
    """Let every layer start as the start deploys it; layers that are not quantized here take its values.

    Args:
        model: The model with the latent weights of the start; its quantizers are not initialised.
        start: What it starts from.

    Raises:
        UserError: As `start_quantizers`.
    """
    ways: Counter[str] = Counter()
    for name, theirs in start_quantizers(model, start).items():
        layer: Any = model.get_submodule(name)
        own = layer.weight_quantizer if isinstance(layer, QuantLinear) else None
        if layer.weight.shape == theirs.weight.shape:
            ways[_take(layer.weight, own, theirs)] += 1
        elif own is not None:  # a new classifier
            own.initialize(layer.weight)
            ways["new weights"] += 1
    assert start is not None
    _take_inputs(model, start.model)
    told = ", ".join(f"{counted(number, 'layer')} with {way}" for way, number in ways.items())
    logger.info("init_quantizers: %s: %s", start.source, told)


def _take_inputs(model: nn.Module, start: nn.Module) -> None:
    """Take the trained quantizers of activations that are of the same kind; calibration sets the others."""
    trained = input_quantizers(start)
    for name, own in input_quantizers(model).items():
        theirs = trained.get(name)
        if theirs is not None and (own.features, own.describe()) == (theirs.features, theirs.describe()):
            own.load_state_dict(theirs.state_dict())


def _take(weight: Tensor, own: Quantizer | None, start: QuantLinear) -> str:
    """Start a layer as its start deploys it; in words, how."""
    theirs, stored = start.weight_quantizer.to(weight.device), start.weight.to(weight.device)
    small = not stored.is_floating_point()
    made = theirs.quantize(stored if small else weight)
    deployed = made.dequantize()
    if own is None:
        weight.copy_(deployed)
        return "the start's values"
    if own.grid == theirs.grid and own.scale.shape == theirs.scale.shape:
        state = theirs.state_dict()
        if own.state_dict().keys() - state.keys():  # another method, which learns more
            own.initialize(weight)
        own.load_state_dict(state, strict=False)
        if small and type(own) is type(theirs):
            weight.data = stored.detach().clone()
        if torch.equal(own.codes(weight), made.codes):
            return "the start's scales"
        with suppress(UserError):
            own.settle(weight, made)
            return "the start's codes and scales"
    weight.copy_(deployed)
    own.initialize(weight)
    return "scales set from the start's values"

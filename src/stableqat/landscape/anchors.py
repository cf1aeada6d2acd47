"""The four points that a run's landscape hangs on: its start and what it trained, latent and deployed.

A point holds the quantized layers' weights first and then every other parameter of the model but those of
quantizers, so that the loss at a point is that of a whole model. All losses are taken on one model in full
precision, whose weights are moved: on deployed values it computes what the quantized model does, unless that
quantizes activations.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stableqat.errors import UserError
from stableqat.landscape.batches import Batches, losses_of
from stableqat.landscape.curvature import mean_loss
from stableqat.landscape.space import Losses, ParameterSpace, Point, WeightSpace, trained_weights
from stableqat.layers.full_precision import full_precision
from stableqat.layers.latent import latent_weights
from stableqat.modules import QATModule
from stableqat.quantizers.inputs import input_quantizers
from stableqat.runs import Run

logger = logging.getLogger(__name__)


@dataclass
class Anchors:
    """The points of a run, on the model it started from.

    Attributes:
        module: The start with the run's quantizers, initialised on its weights, which measurements move.
        space: All its parameters, the quantized weights first.
        quantized: Its quantized weights with their quantizers.
        points: `start` and `trained`, each also `_deployed`.
        codes_changed: Share of codes that differ between the start's and the trained model's.
        batches: Validation data.
        rounded: Runs that are only points here, by name, such as those of `stableqat ptq`.
    """

    module: QATModule
    space: ParameterSpace
    quantized: WeightSpace
    points: dict[str, Point]
    codes_changed: float
    batches: Batches
    rounded: dict[str, Run]

    @contextmanager
    def losses(self, *, bf16: bool = False) -> Iterator[Losses]:
        """The validation losses of the weights themselves, as full precision computes them."""
        with full_precision(self.module):
            yield losses_of(self.module, self.batches, bf16=bf16)

    def others(self) -> dict[str, tuple[Point, float]]:
        """The deployed weights of each rounded run, and their loss; those of other shapes are left out."""
        found = {}
        shapes = {name: weight.shape for name, weight in self.quantized.weights.items()}
        device = next(iter(self.quantized.weights.values())).device
        for name, run in self.rounded.items():
            module = run.load().to(device)
            space = WeightSpace(module)
            if [weight.shape for weight in space.weights.values()] == list(shapes.values()):
                loss = mean_loss(losses_of(module, self.batches)).item()
                found[name] = (space.deployed(), loss)
        return found

    def own(self, name: str) -> Point:
        """The quantized layers' weights of a point."""
        return self.points[name][: len(self.quantized)]


def find_anchors(
    run: Run, batches: Batches, device: torch.device, rounded: dict[str, Run] | None = None
) -> Anchors:
    """Read the points of a run.

    Args:
        run: A trained run with quantizers and a start.
        batches: Validation data on the device.
        device: Where to compute.
        rounded: Runs to draw as points, by name.

    Raises:
        UserError: If the run is in full precision, has no start, or freezes its weights.
    """
    if run.start is None:
        raise UserError(f"{run.checkpoint}: has no init_from, and a landscape lies around a trained start")
    trained = run.load().to(device)
    if input_quantizers(trained):
        logger.warning("%s: quantizes activations, which stay in full precision here", run.checkpoint)
    _, space, weights, trained_codes = _read(run, trained)
    points = {"trained": space.get(), "trained_deployed": _deployed(space, weights)}
    names = list(space.weights)
    del trained, space, weights
    start = run.load_start(quantized=True).to(device)
    module, space, weights, codes = _read(run, start)
    if list(space.weights) != names:
        raise UserError(f"{run.checkpoint}: its start {run.start} has other parameters; take another run")
    points |= {"start": space.get(), "start_deployed": _deployed(space, weights)}
    changed = torch.stack([(a != b).sum() for a, b in zip(codes, trained_codes, strict=True)]).sum()
    return Anchors(module, space, weights, points, changed.item() / weights.size, batches, rounded or {})


def _read(run: Run, module: QATModule) -> tuple[QATModule, ParameterSpace, WeightSpace, list[Tensor]]:
    known = latent_weights(module)
    if not known:
        raise UserError(f"{run.checkpoint}: is in full precision; take runs with quantizers")
    if len(trained_weights(module)) < len(known):
        raise UserError(f"{run.checkpoint}: its method freezes weights, so there is no way between them")
    weights = WeightSpace(module)
    space = ParameterSpace(module, weights.weights | _others(module, weights))
    return module, space, weights, [each.codes for each in weights.quantized()]


def _others(model: nn.Module, weights: WeightSpace) -> dict[str, Tensor]:
    """Every parameter that is neither a latent weight nor a quantizer's."""
    taken = set(weights.weights.values())
    with full_precision(model):
        return {name: each for name, each in model.named_parameters() if each not in taken}


def _deployed(space: ParameterSpace, weights: WeightSpace) -> Point:
    return weights.deployed() + space.get()[len(weights) :]

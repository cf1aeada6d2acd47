"""What slope and curvature at the trained weights predict for the rounding errors of a block's layers.

The prediction for an error d of one layer is `<g, d> + <d, F d> / 2`. F is the Fisher information matrix: the
mean over tokens of `E[s s^T]`, with s the gradient of the log-likelihood of a label that the model itself
draws. For cross-entropy it is the Gauss-Newton part of the Hessian, so it is never negative. Labels are drawn
for all tokens of a batch at once: they are independent, so the square of their summed gradient along d has
the mean of the sum of squares. The trade-off: with 32 draws the curvature is right to a quarter of its value,
and one backward pass serves all errors of all layers of a block, where exact Hessian products would take
several for each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stableqat.landscape.batches import IGNORED
from stableqat.landscape.space import WeightSpace, norm
from stableqat.modules import QATModule
from stableqat.ptq.stream import Block, Stream

DRAWS = 32  # of labels, over all batches, at least one per batch


@dataclass(frozen=True)
class Quadratic:
    """Slope and curvature of the loss along the rounding errors of a layer.

    Attributes:
        slopes: The derivative of the loss along each error.
        curvatures: The second derivative along each.
        random: The mean second derivative along random directions whose root mean square is one grid step.
    """

    slopes: list[float]
    curvatures: list[float]
    random: float


def quadratics(
    block: Block,
    stream: Stream,
    errors: dict[str, Tensor],
    spaces: dict[str, WeightSpace],
    *,
    seed: int,
) -> dict[str, Quadratic]:
    """The quadratic model of the loss along errors of single layers of a block.

    Args:
        block: The block, inside `full_precision`.
        stream: The held-out data that flows into it.
        errors: Per layer, `(errors, out, in)`.
        spaces: The space of each layer's weight.
        seed: Of the labels that are drawn.
    """
    module, device = stream.module, stream.device
    names = list(errors)
    weights = [block.layers[name].weight for name in names]
    flat = {name: each.flatten(1) for name, each in errors.items()}
    slopes = {name: torch.zeros(len(each), device=device) for name, each in errors.items()}
    squares = {name: torch.zeros(len(each), device=device) for name, each in errors.items()}
    random = {name: torch.zeros((), device=device) for name in names}
    draws, scored = -(-DRAWS // len(stream.batches)), 0
    for index, batch in enumerate(stream.batches):
        with stream.resumed(block.number, index):
            logits, labels = _scored(module, batch, device)
        scored += len(labels)
        generator = torch.Generator(device).manual_seed(seed + index)
        drawn = torch.multinomial(logits.detach().softmax(-1), draws, True, generator=generator)
        for number in range(draws + 1):
            target = labels if number == draws else drawn[:, number]
            loss = F.cross_entropy(logits, target, reduction="sum")
            found = torch.autograd.grad(loss, weights, retain_graph=number < draws, materialize_grads=True)
            for name, gradient in zip(names, found, strict=True):
                along = flat[name] @ gradient.flatten()
                if number == draws:
                    slopes[name] += along
                else:
                    squares[name] += along.square() / draws
                    random[name] += norm(spaces[name].in_steps([gradient])).square() / draws
    return {
        name: Quadratic(
            (slopes[name] / scored).tolist(), (squares[name] / scored).tolist(), random[name].item() / scored
        )
        for name in names
    }


def _scored(module: QATModule, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits `(places, classes)` where a label is scored, and these labels."""
    inputs = batch[module.input_key].to(device)
    labels = batch["labels"].to(device)
    if module.family == "text":
        positions = batch.get("position_ids")
        logits = module(inputs, None if positions is None else positions.to(device))[:, :-1]
        labels = labels[:, 1:]
    else:
        logits = module(inputs)
    kept = labels != IGNORED
    return logits[kept].float(), labels[kept]

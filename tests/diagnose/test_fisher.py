"""Slope and curvature of the loss along rounding errors, against exact derivatives."""

import pytest
import torch
from torch.func import functional_call, jvp
from torch.nn import functional as F

import tiny
from stableqat.diagnose import fisher
from stableqat.landscape.space import WeightSpace
from stableqat.layers.full_precision import full_precision
from stableqat.layers.linear import quantized_layers
from stableqat.ptq.stream import Stream

CPU = torch.device("cpu")
OPTIONS = {"llama": {"config": tiny.LLAMA | {"initializer_range": 0.2}}, "vit": {}}


@pytest.fixture(params=["llama", "vit"])
def made(request, monkeypatch):
    """The second block's quadratic models, along rounding errors and random directions."""
    monkeypatch.setattr(fisher, "DRAWS", 800)
    family = request.param
    module = tiny.configured(family, **OPTIONS[family]).eval()
    whole = tiny.batch(family, 4)
    batches = [{key: value[at : at + 2] for key, value in whole.items()} for at in (0, 2)]
    names = list(quantized_layers(module.model))
    spaces = {name: WeightSpace(module.model, [name]) for name in names}
    errors = {}
    for name, space in spaces.items():
        rounding = space.deployed()[0] - space.get()[0]
        random = [next(space.in_steps(space.noise(seed))) for seed in range(40)]
        errors[name] = torch.stack([rounding, -rounding, *random]).detach()
    with full_precision(module.model):
        stream = Stream(module, batches, CPU)
        blocks = stream.blocks()
        next(blocks)
        block = next(blocks)
        own = {name: errors[name] for name in block.layers}
        yield module, whole, own, fisher.quadratics(block, stream, own, spaces, seed=0)


def logits_along(module, batch, name, error):
    """Logits where a label is scored, their derivative along an error of a weight, and the labels."""
    key = f"{name}.weight"
    weight = module.model.get_parameter(key).detach()

    def logits(value):
        state = {key: value}
        if module.family == "text":
            return functional_call(module.model, state, kwargs={"input_ids": batch["input_ids"]}).logits
        return functional_call(module.model, state, (batch["pixel_values"],))

    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        value, along = jvp(logits, (weight,), (error,))
    labels = batch["labels"]
    if module.family == "text":
        value, along, labels = value[:, :-1], along[:, :-1], labels[:, 1:]
    return value.flatten(0, -2), along.flatten(0, -2), labels.flatten()


def test_slope_and_curvature_are_the_exact_ones(made):
    module, batch, errors, found = made
    for name, directions in errors.items():
        logits, along, labels = logits_along(module, batch, name, directions[0])
        p = logits.softmax(-1)
        slope = ((p - F.one_hot(labels, p.shape[1])) * along).sum(1).mean().item()
        curvature = ((p * along.square()).sum(1) - (p * along).sum(1).square()).mean().item()
        own = found[name]
        assert own.slopes[0] == pytest.approx(slope, rel=1e-3, abs=1e-6)
        assert own.slopes[1] == pytest.approx(-own.slopes[0], rel=1e-4)
        assert own.curvatures[0] == pytest.approx(curvature, rel=0.25)  # 800 draws: 5 standard deviations
        assert own.curvatures[1] == own.curvatures[0]


def test_the_mean_over_random_directions(made):
    *_, found = made
    for own in found.values():
        drawn = torch.tensor(own.curvatures[2:])
        off = (drawn.mean() - own.random) / (drawn.std() / len(drawn) ** 0.5)
        assert abs(off) < 4
        assert drawn.std() < own.random  # so that this says something

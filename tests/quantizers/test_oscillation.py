"""Dampening and freezing, with every method: the published figures, and lives of whole runs."""

import copy
import io
from functools import partial
from itertools import pairwise
from math import cos, pi

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stableqat
import tiny
from stableqat.callbacks import PrepareQAT
from stableqat.errors import UserError
from stableqat.export.packed import pack
from stableqat.layers.linear import quantized_layers
from stableqat.modules.graphed import _no_schedule
from stableqat.quantizers import STE
from stableqat.quantizers.factory import methods
from stableqat.quantizers.oscillation import Freezing, dampening, half_cosine
from stableqat.quantizers.position import Position
from stableqat.surgery import quantize_linears
from strangers import Hardening, LowRank, Pulled, Rotated

STEPS = 40
GRIDS = [{"bits": 3}, {"bits": 2, "grid": "stretched"}, {"levels": 3}, {"bits": 1}, {"bits": 8}]
SHAPES = [{}, {"group_size": 4}, {"per_channel": False}]
TRAINS_WEIGHT = [method for method in methods().values() if method.trains_weight]
each_method = pytest.mark.parametrize(
    "method", [*TRAINS_WEIGHT, Hardening, Rotated, Pulled], ids=lambda c: c.__name__
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net():
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))


def start(method, steps=STEPS, step=0, **options):
    """A model, its optimizer and its clock."""
    torch.manual_seed(0)
    model = net()
    quantize_linears(model, partial(method, **{"bits": 2, **options}))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    return model, optimizer, stableqat.follow(model, optimizer, steps, step=step)


def take(model, optimizer, steps, first=0, parts=1):
    """Steps with gradients that push weights to and fro, and scales about."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        x = torch.randn(8, 8, generator=generator)
        for part in x.chunk(parts):
            (0 * model(part).square().sum()).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.grad += (0.2 if parameter.shape[1] > 4 else 0.02) * parameter.abs().mean() * noise
        optimizer.step()
        yield step + 1


def codes(model):
    return [x.weight_quantizer.quantize(x.weight).codes for x in quantized_layers(model).values()]


def freezings(model):
    return [layer.weight_quantizer.freezing for layer in quantized_layers(model).values()]


# -- the published figures --------------------------------------------------------------------------


def test_the_published_figures_of_dampening():
    weight = torch.tensor([[-2.6, -1.2, 0.3, 0.9, 1.7]], requires_grad=True)
    quantizer = STE(weight.detach(), bits=2, dampening=0.1)
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
    for step, strength in ((0, 0.0), (1, 0.01464), (2, 0.05), (4, 0.1)):
        quantizer.position = Position(step, 4)
        penalty = dampening(quantizer, weight)
        assert penalty.item() == pytest.approx(strength * 0.14, abs=1e-6)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient / 0.1, torch.tensor([[0, -0.4, 0.6, -0.2, 0]]))


def test_the_published_figures_of_freezing():
    freezing, found = Freezing(0.0, torch.zeros(1, 1)), []
    for code in (0, 1, 0, 1, 0, 0, 1):
        made, frozen = freezing.count(torch.tensor([[code]], dtype=torch.int8), threshold=1.0)
        assert made.item() == code
        assert not frozen.any()
        found.append(freezing.frequency.item())
    assert found[1:] == pytest.approx([0, 0.01, 0.0199, 0.029701, 0.029404, 0.039110], rel=1e-3)


def test_a_frozen_code_is_the_average_one():
    """Of a code that is mostly 100, at -100 now and then: wide enough for 16 bits, not for 8."""
    freezing, average, frequency, last = Freezing(0.0, torch.zeros(1, 1)), 100.0, 0.0, 0
    freezing.code.fill_(100)
    seen = [100]
    for step in range(200):
        seen.append(-100 if step % 8 == 7 else 100)
        made, frozen = freezing.count(torch.tensor([[seen[-1]]], dtype=torch.int8), threshold=0.1)
        way = (seen[-1] > seen[-2]) - (seen[-1] < seen[-2])
        frequency += 0.01 * ((way * last < 0) - frequency)
        last = way or last
        average += 0.01 * (seen[-1] - average)
        if frequency > 0.1:
            break
        assert made.item() == seen[-1]
        assert not frozen.any()
    assert frozen.all()
    assert made.item() == round(average)
    assert 60 < made.item() < 95
    again, _ = freezing.count(torch.tensor([[-3]], dtype=torch.int8), threshold=0.0)
    assert again.item() == round(average)


def test_schedules_are_half_cosines():
    assert [half_cosine(0.1, 0.01, p) for p in (0, 0.5, 1)] == pytest.approx([0.1, 0.055, 0.01])
    assert half_cosine(0, 0.1, 0.25) == pytest.approx(0.05 * (1 - cos(pi / 4)))


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_dampening_draws_each_weight_to_its_level(options):
    for shape in SHAPES:
        for sign in (1, -1):
            weight = torch.randn(6, 12, requires_grad=True)
            quantizer = STE(weight.detach(), **options, **shape, dampening=0.3)
            with torch.no_grad():
                quantizer.scale.mul_(sign)
                quantizer.scale_floor.mul_(sign)
            quantizer.position = Position(1, 1)
            gradient, *others = torch.autograd.grad(
                dampening(quantizer, weight), [weight, quantizer.scale], allow_unused=True
            )
            assert others == [None]
            scale = quantizer.effective_scale()
            scale = scale.expand(6, -1).repeat_interleave(12 // scale.shape[1], dim=1)
            low, high = quantizer.grid.levels[0], quantizer.grid.levels[-1]
            inside = (low < weight / scale) & (weight / scale < high)
            expected = -0.6 * (quantizer.quantize(weight).dequantize() - weight) * inside
            torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-6)


# -- with every method ------------------------------------------------------------------------------


@each_method
def test_frozen_codes_stay_while_scales_move(method):
    for shape in ({}, {"group_size": 4}):
        model, optimizer, _ = start(method, freezing=0.003, **shape)
        kept, scales = [{} for _ in freezings(model)], set()
        for _ in take(model, optimizer, STEPS):
            scales.add(model[0].weight_quantizer.scale[0, 0].item())
            for seen, freezing, made in zip(kept, freezings(model), codes(model), strict=True):
                assert torch.equal(freezing.code, made)
                for place in map(tuple, freezing.frozen.nonzero().tolist()):
                    assert seen.setdefault(place, made[place].item()) == made[place]
        assert len(scales) == STEPS
        assert 3 < len(kept[0]) < 128
        # on its level, and so deployed
        layer = model[0]
        value = layer.weight_quantizer.quantize(layer.weight).dequantize()
        if method is not Rotated:
            frozen = freezings(model)[0].frozen
            assert torch.equal(layer.weight[frozen], value[frozen])
        assert torch.equal(stableqat.convert(copy.deepcopy(model.eval()))[0].weight, value)


@each_method
def test_dampening_joins_each_step(method):
    """Also where a method has a penalty of its own."""
    gradients = []
    for options in ({}, {"dampening": 0.5}):
        model, optimizer, clock = start(method, 2, step=1, **options)
        F.mse_loss(model(torch.ones(2, 8)), torch.ones(2, 4)).backward()
        before = optimizer.param_groups[0]["lr"]
        clock.penalize(optimizer)
        assert before == 1.0
        gradients.append(model[0].weight.grad)
    weight, quantizer = model[0].weight.detach().requires_grad_(), model[0].weight_quantizer
    (pull,) = torch.autograd.grad(dampening(quantizer, weight), weight)
    assert pull.abs().max() > 1e-3
    torch.testing.assert_close(gradients[1] - gradients[0], pull, rtol=1e-4, atol=1e-5)


def test_a_dampened_low_rank_method_trains_its_factors_and_has_nothing_to_freeze():
    model, optimizer, _ = start(LowRank, dampening=5.0, rank=4)
    before = model[0].weight_quantizer.latent(model[0].weight).detach().clone()
    nn.init.normal_(model[0].weight_quantizer.up, std=0.1)
    list(take(model, optimizer, 5))
    assert not torch.equal(model[0].weight_quantizer.latent(model[0].weight), before)
    with pytest.raises(UserError, match="freezing: LowRank does not train the weight"):
        LowRank(torch.randn(4, 8), bits=2, freezing=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampening": -1.0}, "dampening: must be at least 0"),
        ({"dampening": float("nan")}, "dampening: must be at least 0"),
        ({"freezing": 1.5}, "freezing: must be at least 0 and at most 1 or null, not 1.5"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        STE(torch.randn(4, 8), bits=2, **options)


def test_without_either_a_method_is_as_before():
    quantizer = STE(torch.randn(4, 8), bits=2)
    assert set(quantizer.state_dict()) == {"scale", "scale_floor"}
    assert not {"dampening", "freezing"} & quantizer.describe().keys()
    both = STE(torch.randn(4, 8), bits=2, dampening=0.1, freezing=0.02).describe()
    assert (both["dampening"], both["freezing"]) == (0.1, 0.02)


def test_what_is_known_of_a_weight_takes_six_bytes():
    state = Freezing(0.01, torch.zeros(4, 8)).parameters()
    assert sum(each.element_size() for each in state) == 6


def test_a_weight_that_is_loaded_later_starts_with_nothing_known():
    quantizer = STE(torch.empty(4, 8, device="meta"), bits=2, freezing=0.01).to_empty(device="cpu")
    for state in quantizer.freezing.parameters():
        nn.init.constant_(state, 3)  # memory as it was
    quantizer.initialize(torch.randn(4, 8))
    assert not any(state.any() for state in quantizer.freezing.parameters())


# -- the life of a run ------------------------------------------------------------------------------


def test_flips_are_counted_once_per_step_however_many_micro_batches_it_has():
    models = []
    for parts in (1, 4):
        model, optimizer, _ = start(STE, freezing=0.01)
        seen = [codes(model)]
        for _ in take(model, optimizer, 12, parts=parts):
            seen.append(codes(model))
        models.append(model)
    whole, parts = ([x for f in freezings(model) for x in f.parameters()] for model in models)
    assert all(map(torch.equal, whole, parts))
    frequency, last = torch.zeros(16, 8), torch.zeros(16, 8)  # by hand
    for (before, _), (after, _) in pairwise(seen):
        way = (after - before).sign()
        frequency += 0.01 * ((way * last < 0).float() - frequency)
        last = torch.where(way == 0, last, way)
    free = ~freezings(model)[0].frozen
    assert frequency.count_nonzero() > 10
    torch.testing.assert_close(
        freezings(model)[0].frequency[free].float(), frequency[free], rtol=3e-3, atol=1e-6
    )


@pytest.mark.parametrize("options", [{"freezing": 0.003}, {"freezing": 0.003, "dampening": 0.5}], ids=str)
def test_a_run_resumes_bit_for_bit(options):
    whole, optimizer, _ = start(STE, **options)
    list(take(whole, optimizer, STEPS))
    killed, optimizer, _ = start(STE, **options)
    list(take(killed, optimizer, 25))
    file = io.BytesIO()
    torch.save((killed.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed = net()
    quantize_linears(resumed, partial(STE, bits=2, **options), initialize=False)
    resumed.load_state_dict(states[0])
    optimizer = torch.optim.SGD(resumed.parameters(), lr=1.0, momentum=0.5)
    optimizer.load_state_dict(states[1])
    stableqat.follow(resumed, optimizer, STEPS, step=25)
    list(take(resumed, optimizer, STEPS - 25, first=25))
    expected = whole.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in resumed.state_dict().items())
    assert any(each.frozen.any() for each in freezings(whole))


def test_a_training_keeps_what_is_known_of_codes_that_are_as_they_were():
    """A second training continues to count; where another start moved a code, it begins anew."""
    model, optimizer, _ = start(STE, freezing=0.003)
    list(take(model, optimizer, STEPS))
    freezing, layer = freezings(model)[0], model[0]
    frozen = freezing.frozen.clone()
    stableqat.follow(model, optimizer, STEPS)
    assert torch.equal(freezing.frozen, frozen)
    before = codes(model)[0]
    with torch.no_grad():
        layer.weight.neg_()
    moved = codes(model)[0] != before
    assert moved[frozen].any()
    stableqat.follow(model, optimizer, STEPS)
    assert torch.equal(freezing.frozen, frozen & ~moved)
    assert torch.equal(freezing.code, codes(model)[0])
    layer.weight_quantizer.settle(layer.weight, layer.weight_quantizer.quantize(layer.weight))
    assert not freezing.frozen.any()


def test_graphs_hold_steps_of_either():
    """Neither reads the progress of training in the forward, where a graph would keep the first."""
    model, *_ = start(STE, dampening=0.1, freezing=0.01)
    with _no_schedule(model):
        model.train()(torch.ones(2, 8)).sum().backward()


@pytest.mark.parametrize("family", ["llama", "vit"])
@pytest.mark.parametrize("prepared", [False, True], ids=["module", "PrepareQAT"])
def test_a_lightning_run_freezes_and_dampens(family, prepared, tmp_path):
    weights, counts = [], []
    for options in ({"bits": 2}, {"bits": 2, "dampening": 50.0, "freezing": 0.0}):
        optimizer = partial(torch.optim.SGD, lr=1.0)
        quantizer, callbacks = partial(STE, **options), []
        module = tiny.module(family, quantizer=None if prepared else quantizer, optimizer=optimizer)
        if prepared:
            callbacks.append(PrepareQAT(quantizer, skip=module.skip))
        torch.manual_seed(0)
        trainer = tiny.trainer(callbacks=callbacks, max_steps=6)
        trainer.fit(module, tiny.loader(family, 64))
        layers = quantized_layers(module).values()
        weights.append(torch.cat([layer.weight.detach().flatten() for layer in layers]))
        if "freezing" in options:
            counts = [layer.weight_quantizer.freezing.frozen.sum().item() for layer in layers]
            if not prepared:  # a checkpoint has all of it
                trainer.save_checkpoint(tmp_path / "run.ckpt")
                loaded = type(module).load_from_checkpoint(tmp_path / "run.ckpt")
                assert all(map(torch.equal, module.state_dict().values(), loaded.state_dict().values()))
                packed = pack(loaded, torch.float32, torch.float32)  # as every export does
                for name, layer in quantized_layers(module.model).items():
                    freezing = layer.weight_quantizer.freezing
                    assert torch.equal(packed[name].codes[freezing.frozen], freezing.code[freezing.frozen])
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    assert 0 < sum(counts) < len(weights[0])

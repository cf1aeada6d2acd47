"""Methods that this package does not have, hosted by its interface.

Each deploys what `quantize` says, like any other method; those with a schedule, a penalty or a step of their
own get them from one call, `stableqat.follow`.
"""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stableqat
from stableqat.errors import UserError
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import STE
from stableqat.quantizers.position import Position
from stableqat.surgery import quantize_linears
from strangers import Dampened, Freezing, Hardening, LowRank, Rotated, RotatedInput, Stochastic, rotate

STRANGERS = [Hardening, Stochastic, Dampened, Freezing, LowRank]
SHAPES = {"channel": {}, "group": {"group_size": 8}}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


def train(model, steps=80):
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    y = (x[:, :4] * x[:, 4:8]).sign()
    optimizer = torch.optim.AdamW(stableqat.parameter_groups(model, lr=5e-3, scale_lr_multiplier=1))
    clock = stableqat.follow(model, optimizer, steps)
    losses = []
    for step in range(steps):
        assert clock.position.step == step
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_lives_a_whole_life(stranger, shape):
    factory = partial(stranger, bits=3, **SHAPES[shape])
    model = net()
    report = quantize_linears(model, factory, skip=["4"])
    assert report.swapped == ["0", "2"]
    losses = train(model.train())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])

    # what is deployed is the evaluation forward, bit for bit
    model.eval()
    x = torch.randn(32, 16)
    answer = model(x)
    assert torch.equal(model(x), answer)
    deployed = net().eval()
    for name, layer in quantized_layers(model).items():
        quantized = layer.weight_quantizer.quantize(layer.weight)
        assert torch.equal(quantized.dequantize(), layer.weight_quantizer(layer.weight))
        with torch.no_grad():
            deployed.get_submodule(name).weight.copy_(quantized.dequantize())
            deployed.get_submodule(name).bias.copy_(layer.bias)
    deployed[4].load_state_dict(model[4].state_dict())
    assert torch.equal(deployed(x), answer)

    # a state dict carries all of it into a model whose scales were never set
    fresh = net()
    quantize_linears(fresh, factory, skip=["4"], initialize=False)
    assert fresh[0].weight_quantizer.scale.isnan().all()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), answer)
    for buffer, other in zip(fresh.buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_the_soft_one_hardens_with_the_clock():
    weight = torch.randn(8, 64)
    soft, hard = Hardening(weight, bits=2).train(), STE(weight, bits=2)(weight)
    assert torch.equal(soft.eval()(weight), hard)  # evaluation is hard from the first step on
    soft.train()
    assert torch.equal(soft(weight), weight)  # no clock: where training starts
    soft.position = Position(0, 10)
    gaps = []
    for soft.position.step in range(12):  # beyond the planned end it stays where it is
        gaps.append((soft(weight) - hard).abs().max().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.5
    assert gaps[9] > 0
    assert gaps[10:] == [0, 0]


def accumulate(model, batches, parts, clip=None):
    """Train with so many micro-batches per step; returns all weights."""
    optimizer = torch.optim.SGD(stableqat.parameter_groups(model, lr=0.05))
    clock = stableqat.follow(model, optimizer, len(batches))
    seen = []
    for x, y in batches:
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            seen.append(clock.position.progress)
            (F.mse_loss(model(part_x), part_y) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [step / len(batches) for step in range(len(batches)) for _ in range(parts)]
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batches(count=6):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(32, 16, generator=generator), torch.randn(32, 4, generator=generator))
        for _ in range(count)
    ]


def test_a_penalty_joins_each_step_once_however_many_micro_batches_it_has():
    first = net()
    quantize_linears(first, partial(Dampened, bits=3, strength=2.0), skip=["4"])
    twin, plain = copy.deepcopy(first), copy.deepcopy(first)
    whole, parts = accumulate(first, batches(), 1), accumulate(twin, batches(), 4)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)

    # by hand: the same penalty added to the loss of each step
    optimizer = torch.optim.SGD(stableqat.parameter_groups(plain, lr=0.05))
    for step, (x, y) in enumerate(batches()):
        loss = F.mse_loss(plain(x), y)
        for layer in quantized_layers(plain).values():
            layer.weight_quantizer.position = Position(step, 6)
            loss = loss + layer.weight_quantizer.penalty(layer.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    by_hand = torch.cat([p.detach().flatten() for p in plain.parameters()])
    torch.testing.assert_close(whole, by_hand, rtol=1e-5, atol=1e-7)


def test_the_published_figures_of_dampening():
    weight = torch.tensor([[-2.6, -1.2, 0.3, 0.9, 1.7]], requires_grad=True)
    quantizer = Dampened(weight.detach(), bits=2, strength=0.1)
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
    for step, strength in ((0, 0.0), (1, 0.01464), (2, 0.05), (4, 0.1)):
        quantizer.position = Position(step, 4)
        penalty = quantizer.penalty(weight)
        assert penalty.item() == pytest.approx(strength * 0.14, abs=1e-6)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient / 0.1, torch.tensor([[0, -0.4, 0.6, -0.2, 0]]))


def test_a_penalty_follows_a_closure_and_a_dropped_step_has_none():
    models = [net() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, closed in zip(models, (False, True), strict=True):
        quantize_linears(model, partial(Dampened, bits=2, strength=5.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        stableqat.follow(model, optimizer, 2, step=1)
        x, y = batches(1)[0]

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        if not closed:
            closure()
        optimizer.step(closure if closed else None)
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        optimizer.step()
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_methods_without_a_clock_cost_nothing():
    model = net()
    quantize_linears(model, partial(STE, bits=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clock = stableqat.follow(model, optimizer, 5)
    assert not optimizer._optimizer_step_pre_hooks
    assert len(optimizer._optimizer_step_post_hooks) == 1  # counts
    assert not any(clock._by_optimizer.values())
    clock.remove()
    assert not optimizer._optimizer_step_post_hooks


def test_a_run_of_unknown_length_has_no_progress():
    model = net()
    quantize_linears(model, partial(Hardening, bits=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stableqat.follow(model, optimizer)
    with pytest.raises(UserError, match=r"length of the run, which is unknown; set trainer.max_steps"):
        model.train()(torch.randn(2, 16))
    model.eval()(torch.randn(2, 16))


def test_a_quantizer_that_acts_wants_its_weight_in_the_optimizer():
    model = net()
    quantize_linears(model, partial(Dampened, bits=2), skip=["4"])
    with pytest.raises(UserError, match=r"Dampened acts on each step, and no optimizer has its weight"):
        stableqat.follow(model, torch.optim.SGD(model[4].parameters(), lr=0.1), 3)


def test_a_frozen_code_stays_while_its_scale_moves():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    quantize_linears(model, partial(Freezing, bits=2))
    layer, optimizer = model[0], torch.optim.SGD(model.parameters(), lr=0.5)
    stableqat.follow(model, optimizer, 50)
    quantizer = layer.weight_quantizer
    frozen, scales = {}, set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=generator)).square().sum().neg().tanh().backward()
        for parameter in (layer.weight, quantizer.scale):  # restless
            parameter.grad = torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()
        optimizer.step()
        codes = quantizer.quantize(layer.weight).codes
        scales.add(quantizer.scale[0].item())
        for place in (quantizer.frozen <= quantizer.grid.q_max).nonzero().tolist():
            code = codes[tuple(place)].item()
            assert frozen.setdefault(tuple(place), code) == code
    assert len(scales) > 40
    assert 5 < len(frozen) <= 64


def test_a_run_resumes_bit_for_bit_with_the_state_of_its_methods():
    """State dicts of model and optimizer and the number of steps are all that a foreign trainer keeps."""

    def start(method):
        torch.manual_seed(0)
        model = net()
        quantize_linears(model, partial(method, bits=2))
        return model, torch.optim.AdamW(stableqat.parameter_groups(model, lr=2e-2))

    def steps(model, optimizer, data):
        for x, y in data:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()

    for method in (Hardening, Dampened, Freezing, LowRank):
        whole, optimizer = start(method)
        stableqat.follow(whole, optimizer, 12)
        steps(whole, optimizer, batches(12))

        killed, optimizer = start(method)
        stableqat.follow(killed, optimizer, 12)
        steps(killed, optimizer, batches(12)[:7])
        file = io.BytesIO()
        torch.save((killed.state_dict(), optimizer.state_dict()), file)
        file.seek(0)

        resumed, optimizer = start(method)
        states = torch.load(file, weights_only=True)
        resumed.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        stableqat.follow(resumed, optimizer, 12, step=7)
        steps(resumed, optimizer, batches(12)[7:])
        expected = whole.state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in resumed.state_dict().items()), method
        assert torch.equal(resumed(batches(1)[0][0]), whole(batches(1)[0][0]))


def test_a_low_rank_method_trains_its_factors_like_weights_and_leaves_the_weight():
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    quantize_linears(model, partial(LowRank, bits=3), skip=["4"])
    groups = {g["name"]: g["params"] for g in stableqat.parameter_groups(model)}
    quantizer = model[0].weight_quantizer
    assert any(p is quantizer.up for p in groups["weights"])
    assert not any(p is model[0].weight for p in groups["weights"])
    assert {id(m.weight_quantizer.scale) for m in (model[0], model[2])} == {id(p) for p in groups["scales"]}
    train(model.train(), 5)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert quantizer.up.abs().max() > 0
    assert not torch.equal(quantizer.latent(model[0].weight), model[0].weight)
    value = model[0].value()
    assert torch.equal(stableqat.convert(model)[0].weight, value)


def test_a_rotated_method_rounds_in_another_basis_and_its_input_follows():
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(64, 16)
    exact = model(x)
    quantize_linears(model, partial(Rotated, bits=4), input_quantizer=lambda features: RotatedInput())
    assert (model(x) - exact).square().mean() < 0.02 * exact.var()
    layer = model[0]
    made = layer.weight_quantizer.quantize(layer.weight)
    with torch.no_grad():
        expected = F.linear(rotate(x), made.dequantize(), layer.bias)
    assert torch.equal(model(x), expected)


def test_the_stochastic_one_is_right_on_average():
    weight = torch.rand(4, 32) * 2 - 1.4
    quantizer = Stochastic(weight, bits=2).train()
    with torch.no_grad():
        quantizer.scale.fill_(1.0)  # all inside [-2, 1]: rounding keeps the mean
    draws = torch.stack([quantizer(weight) for _ in range(1000)]).detach()
    assert set(draws.unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}
    torch.testing.assert_close(draws.mean(0), weight, rtol=0, atol=0.08)
    assert torch.equal(quantizer.eval()(weight), weight.round())


def test_dropout_and_strangers_share_one_seed():
    weight = torch.randn(4, 32)
    quantizer = Stochastic(weight, bits=2).train()
    torch.manual_seed(7)
    first = quantizer(weight)
    assert not torch.equal(first, quantizer(weight))
    torch.manual_seed(7)
    assert torch.equal(first, quantizer(weight))

"""The clock of any trainer: called twice, under a loss scaler, with several optimizers, and compiled."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import stableqat
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import STE
from stableqat.quantizers.position import Position
from stableqat.surgery import quantize_linears
from strangers import Hardening, Pulled


class Overflowing(nn.Module):
    """A layer whose gradient overflows where it is told to."""

    def __init__(self, method=Pulled):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 4))
        quantize_linears(self.net, partial(method, bits=2))
        self.layer = self.net[0]

    def forward(self, x, overflow=False):
        return self.net(x).square().mean() * (torch.inf if overflow else 1)


def batch(step=0, width=8):
    return torch.randn(16, width, generator=torch.Generator().manual_seed(step))


def take(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# -- one clock per quantizer ------------------------------------------------------------------------


def test_a_second_call_replaces_the_first():
    once = Overflowing()
    twice = copy.deepcopy(once)
    for model, calls in ((once, 1), (twice, 2)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(calls):
            stableqat.follow(model, optimizer, 4)
        take(model, optimizer, 2)
        assert model.layer.weight_quantizer.seen_progress == [0.25, 0.5]
        assert model.layer.weight_quantizer.progress == 0.5
    for name, value in weights(once).items():
        assert torch.equal(value, weights(twice)[name])


def test_another_training_of_the_same_model_needs_no_more_than_a_call():
    model = Overflowing()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    stableqat.follow(model, first, 2)
    take(model, first, 2)
    stableqat.follow(model, second, 10)
    take(model, second, 1)
    assert model.layer.weight_quantizer.seen_progress == [0.5, 1.0, 0.1]
    take(model, first, 1)  # followed no more
    assert model.layer.weight_quantizer.seen_progress == [0.5, 1.0, 0.1]
    assert model.layer.weight_quantizer.progress == 0.1


def test_parts_of_a_model_may_have_clocks_of_their_own():
    model = nn.ModuleList([Overflowing(), Overflowing()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for part, steps in zip(model, (2, 4), strict=True):
        stableqat.follow(part, optimizer, steps)
    optimizer.zero_grad()
    sum(part(batch()) for part in model).backward()
    optimizer.step()
    assert [part.layer.weight_quantizer.seen_progress for part in model] == [[0.5], [0.25]]


# -- loss scalers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_loss_scaler_skips_does_not_count(fused, clips):
    """The next one has its penalty, of its own size whatever the scale is."""
    model, plain = Overflowing(), Overflowing(STE)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.Adam(each.parameters(), lr=0.0, fused=fused)
        clock = stableqat.follow(each, optimizer, 4)
        for step, overflow in enumerate([False, True, True, False]):
            optimizer.zero_grad()
            scaler.scale(each(batch(step), overflow)).backward()
            if clips:
                scaler.unscale_(optimizer)
                clock.penalize(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**8
        assert clock.position.step == 2
    assert model.layer.weight_quantizer.seen_progress == [0.25, 0.5]
    difference = model.layer.weight.grad - plain.layer.weight.grad
    torch.testing.assert_close(difference, torch.ones_like(difference), rtol=0, atol=1e-5)


# -- compiled ---------------------------------------------------------------------------------------


def test_a_compiled_model_follows_its_schedule_with_one_graph_more():
    """The first graph holds the progress of the first step, the second takes any."""
    models = [nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).train()]
    quantize_linears(models[0], partial(Hardening, bits=2))
    models.append(copy.deepcopy(models[0]))
    torch.compiler.reset()
    graphs, losses = CompileCounter(), []
    for model, forward in zip(models, (models[0], torch.compile(models[1], backend=graphs)), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        stableqat.follow(model, optimizer, 12)
        found = []
        for step in range(14):  # beyond the planned end, too
            loss = F.mse_loss(forward(batch(step, 16)), batch(step, 16)[:, :4])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == losses[1]
    assert graphs.frame_count == 2
    assert {layer.weight_quantizer.progress for layer in quantized_layers(models[1]).values()} == {1.0}


def test_progress_stays_in_its_range():
    position = Position(3, 4)
    shares = []
    for position.step in (0, 1, 4, 9):
        shares.append(position.progress)
    assert shares == [0.0, 0.25, 1.0, 1.0]
    assert Position(0, 0).progress == 0.0

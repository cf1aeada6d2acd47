"""The basin's radius in grid steps, and the inward test, where both are known."""

from math import inf, isnan, sqrt

import pytest
import torch
from quadratic import INPUTS, ROWS, Quadratic

from stableqat.errors import UserError
from stableqat.landscape.basin import inward, of_one_step, radius
from stableqat.layers.full_precision import full_precision


@pytest.fixture
def toy():
    made = Quadratic()
    with full_precision(made.net):
        yield made


def expand(toy):
    return toy.net[0].weight_quantizer.scale.detach().double().expand(ROWS, INPUTS)


@pytest.fixture
def steps():
    """The scale of every weight; quantizers are away while the model is in full precision."""
    return expand(Quadratic())


def test_a_direction_of_one_step(toy, steps):
    (found,) = of_one_step(toy.space, toy.point(torch.randn(12, dtype=torch.float64)))
    assert (found / steps).square().mean().sqrt().item() == pytest.approx(1)


@pytest.mark.parametrize("rise", [1e-5, 0.02, 0.3, 20.0])
def test_the_radius_is_the_nearer_crossing(toy, steps, rise):
    (w,) = toy.space.get()
    flat, by = w.flatten(), torch.randn(12, dtype=torch.float64)
    unit = by / ((by.view(ROWS, INPUTS) / steps).square().mean().sqrt())
    slope = (toy.slope + toy.hessian @ flat) @ unit
    curvature = unit @ toy.hessian @ unit
    assert curvature > 0
    # slope t + curvature t^2 / 2 = rise, on the side where the loss climbs
    known = ((slope.square() + 2 * curvature * rise).sqrt() - slope.abs()) / curvature
    found = radius(toy.space, toy.losses, toy.point(3 * by), rise=rise)
    assert found == pytest.approx(known.item(), rel=0.02)
    assert torch.equal(toy.space.get()[0], w)


@pytest.mark.parametrize("first", [1e-3, 1.0, 30.0])
def test_a_search_that_begins_near_the_radius_takes_fewer_losses(toy, first):
    by, calls = toy.point(torch.randn(12, dtype=torch.float64)), []

    def counted():
        calls.append(1)
        return toy.losses[0]()

    exact, losses = radius(toy.space, toy.losses, by, rise=0.3), [counted, *toy.losses[1:]]
    assert radius(toy.space, losses, by, rise=0.3, first=first, halvings=1) == pytest.approx(exact, rel=0.2)
    far = len(calls)
    calls.clear()
    radius(toy.space, losses, by, rise=0.3, first=exact * sqrt(2), halvings=1)
    assert len(calls) == 7 <= far  # at the weights, and on both sides at three lengths


def test_a_flat_loss_has_no_radius_and_a_broken_one_none_either(toy):
    by = toy.point(torch.ones(12, dtype=torch.float64))
    flat = [lambda: toy.weight().sum() * 0]
    assert radius(toy.space, flat, by) == inf
    (start,) = toy.space.get()

    def broken():
        moved = (toy.weight().view(ROWS, INPUTS) - start).abs().max()
        return torch.where(moved > 0, torch.nan, 0.0)

    assert radius(toy.space, [broken], by) == 0
    with pytest.raises(UserError, match=r"^rise: must be at least"):
        radius(toy.space, flat, by, rise=0.0)


def test_the_gradient_points_inward_where_it_is_taken_outside(toy):
    """A basin with a wall: flat at the weights, steep where they are deployed."""
    (w,) = toy.space.get()
    reference = torch.zeros(ROWS, INPUTS, dtype=torch.float64)
    limit = w.abs().max() * 1.01

    def walled():
        y = toy.weight().view(ROWS, INPUTS)
        return (y.abs() - limit).clamp(min=0).square().sum() + 1e-6 * (y * torch.arange(INPUTS)).sum()

    outside = [3 * limit * w.sign()]
    at_deployed = inward(toy.space, [walled], [reference], outside)
    at_weights = inward(toy.space, [walled], [reference])
    towards = -w.flatten()
    expected = (-w.sign().flatten() @ towards) / (sqrt(12) * towards.norm())
    assert at_deployed == pytest.approx(expected.item(), abs=1e-4)
    assert abs(at_weights) < 0.7
    assert inward(toy.space, [walled], [2 * w], outside) == pytest.approx(-expected.item(), abs=1e-4)
    assert isnan(inward(toy.space, [walled], [w], outside))
    assert torch.equal(toy.space.get()[0], w)

"""The toy's numbers: rounding fails, descent at the rounded point recovers, within the bound."""

from functools import partial
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stableqat.errors import UserError
from stableqat.landscape.toy import Toy, Valley, descend
from stableqat.quantizers import DSQ, STE, StableQAT

LR = 0.02
METHODS = {"ste": STE, "dsq": DSQ, "stableqat": partial(StableQAT, amplitude=0.21)}
each_method = pytest.mark.parametrize("method", METHODS)


def toy(method="ste", **options):
    return Toy(partial(METHODS[method], bits=8, mask="none"), **options)


def trained(made, steps=400, kind=torch.optim.SGD, lr=LR, loss=None):
    return descend(made, kind([made.weight], lr=lr), steps, loss)


def point(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_both_roundings_leave_the_basin_although_a_level_inside_is_near():
    made = toy()
    valley, start = made.valley, made.weight.detach()
    assert made.deployed().item() == pytest.approx(1.3)
    assert made.by_curvature().item() == pytest.approx(1.3)
    assert valley.predicted(start, point(1.3)) == pytest.approx(0.0025)
    assert valley.predicted(start, point(-0.4)) == pytest.approx(0.0144)
    assert valley.loss(point(1.3)).item() == pytest.approx(0.197, abs=5e-4)
    assert valley.loss(point(-0.4)).item() == pytest.approx(0.0016)
    assert not valley.inside(point(1.3))
    assert valley.inside(point(-0.4))


@pytest.mark.parametrize(
    ("method", "entry", "bound", "weight"),
    [("ste", 15, 27, 0.4322), ("dsq", 12, 24, 0.4242), ("stableqat", 29, 95, 0.4492)],
)
def test_descent_at_the_rounded_point_enters_within_the_bound(method, entry, bound, weight):
    made = toy(method)
    assert made.bound(LR) == bound
    path = trained(made, 30)
    assert path.entry == entry
    assert path.latent[entry].item() == pytest.approx(weight, abs=5e-5)
    assert path.deployed[entry - 1].item() == pytest.approx(1.3)
    assert path.deployed[entry].item() == pytest.approx(-0.4)


def test_under_adam_the_methods_enter_together():
    entries = {name: trained(toy(name), 40, torch.optim.Adam).entry for name in METHODS}
    assert entries == {"ste": 18, "dsq": 18, "stableqat": 17}


def test_descent_in_full_precision_does_not_help_rounding():
    made = toy()
    path = trained(made, 20, loss=made.latent_loss)
    assert path.entry is None
    assert made.deployed().item() == made.by_curvature().item() == pytest.approx(1.3)
    assert path.latent[-1].item() == pytest.approx(0.8 * (1 - LR * 0.02) ** 20)


@each_method
def test_along_a_river_the_same_entry_and_the_loss_keeps_falling(method):
    flat = trained(toy(method)).entry
    made = toy(method, start=(0.0, 0.8), valley=Valley(slope=2.0))
    before = made.latent_loss().item()
    path = trained(made)
    assert path.entry == flat
    after = [made.valley.loss(each).item() for each in path.deployed[path.entry :]]
    assert after[-1] < after[0] < before
    assert path.deployed[-1, 0] > path.deployed[0, 0]  # it also flows


def test_curvature_chooses_among_all_corners():
    made = toy(start=(1.0, 0.8))
    assert made.by_curvature().tolist() == pytest.approx([0.0, 1.3])  # x costs nothing: the first of a tie
    made = toy(start=(1.0, 0.4))
    assert made.by_curvature()[1].item() == pytest.approx(-0.4)


@settings(max_examples=30)
@given(method=st.sampled_from(sorted(METHODS)), start=st.floats(-3, 3), offset=st.floats(-0.85, 0.85))
def test_the_bound_holds_from_any_start_on_any_grid(method, start, offset):
    made = toy(method, start=(start,), offset=offset)
    bound = made.bound(LR)
    if bound > 600:  # StableQAT beside a level
        return
    path = trained(made, max(int(bound), 1))
    assert path.entry is not None
    assert path.entry <= bound
    assert (bound == 0) == (path.entry == 0)


def test_the_bound_needs_a_wide_basin_and_small_steps():
    narrow = toy(valley=Valley(radius=0.8), offset=0.85)  # levels at -0.85 and 0.85, both outside
    assert narrow.bound(LR) == inf
    assert trained(narrow, 2000).entry is None
    assert toy().bound(0.3 / 1.226 * 0.99) < inf
    assert toy().bound(0.3 / 1.226 * 1.01) == inf


def test_a_descent_has_steps():
    with pytest.raises(UserError, match=r"^steps: must be at least 1"):
        trained(toy(), 0)


@each_method
def test_the_page_has_these_numbers(method, request):
    page = (request.config.rootpath / "docs" / "geometry.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"]
    name = METHODS[method].func.__name__ if method == "stableqat" else METHODS[method].__name__
    (row,) = [row[1:] for row in rows if row[0] == name]
    made = toy(method)
    sgd, adam = (trained(toy(method), 40, kind).entry for kind in (torch.optim.SGD, torch.optim.Adam))
    assert [int(cell) for cell in row] == [sgd, made.bound(LR), adam]

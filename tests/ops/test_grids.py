"""Grids and masks: the levels and the ends of the gradient's interval, written out."""

from math import inf

import pytest

from stableqat.errors import UserError
from stableqat.ops import make_grid

LEVELS = {
    ("integer", 2): (-2, -1, 0, 1),
    ("integer", 3): (-4, -3, -2, -1, 0, 1, 2, 3),
    ("stretched", 2): (-1.5, -0.5, 0.5, 1.5),
    ("stretched", 3): (-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5),
    ("ternary", 2): (-1, 0, 1),
    ("binary", 1): (-0.5, 0.5),
}
BOUNDS = {
    ("integer", 2, "range"): (-2, 1),
    ("integer", 4, "range"): (-8, 7),
    ("stretched", 2, "range"): (-2, 2),
    ("stretched", 4, "range"): (-8, 8),
    ("ternary", 2, "range"): (-1.5, 1.5),
    ("binary", 1, "range"): (-0.5, 0.5),
    ("integer", 2, "levels"): (-2, 1),
    ("stretched", 2, "levels"): (-1.5, 1.5),
    ("ternary", 2, "levels"): (-1, 1),
    ("binary", 1, "levels"): (-0.5, 0.5),
    ("stretched", 2, "none"): (-inf, inf),
    ("binary", 1, "none"): (-inf, inf),
}


@pytest.mark.parametrize(("name", "bits"), LEVELS)
def test_levels(name, bits):
    grid = make_grid(name, bits)
    assert grid.levels == LEVELS[name, bits]
    assert len(grid.levels) <= 2**grid.bits


@pytest.mark.parametrize("name", ["integer", "stretched"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_fits_into_its_bits_and_int8(name, bits):
    grid = make_grid(name, bits)
    assert len(grid.levels) == 2**bits
    assert -128 <= grid.q_min < grid.q_max <= 127


@pytest.mark.parametrize(("name", "bits", "mask"), BOUNDS)
def test_bounds_of_the_gradient(name, bits, mask):
    assert make_grid(name, bits).bounds(mask) == BOUNDS[name, bits, mask]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *[("integer", bits) for bits in (-1, 0, 1, 9)],
        *[("stretched", 1), ("stretched", 9), ("ternary", 1), ("ternary", 3), ("binary", 0), ("binary", 2)],
    ],
)
def test_a_grid_that_does_not_exist_at_a_width(name, bits):
    with pytest.raises(UserError, match=rf"bits.*{name} grid takes .* not {bits}"):
        make_grid(name, bits)


def test_unknown_grid_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'log2'.*binary.*ternary.*integer.*stretched"):
        make_grid("log2", 2)

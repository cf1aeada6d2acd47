"""The chosen widths are the best of all that fit."""

from itertools import product

import numpy as np
import pytest

from stableqat.diagnose.widths import choose_widths

WIDTHS = (2, 3, 4, 8)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [2.0, 2.4, 3.0, 5.5, 8.0])
def test_against_brute_force(seed, budget):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, 5).tolist()
    # as small as measured rises, of very different layers, and not always falling with the width
    costs = [
        {bits: float(rng.lognormal(-3 - bits, 2) - 1e-5 * rng.random()) for bits in WIDTHS} for _ in sizes
    ]

    def size(widths):
        return sum(n * bits for n, bits in zip(sizes, widths, strict=True))

    def cost(widths):
        return sum(each[bits] for each, bits in zip(costs, widths, strict=True))

    best = min(
        cost(each) for each in product(WIDTHS, repeat=5) if size(each) <= budget * sum(sizes) * (1 + 1e-9)
    )
    found = choose_widths(costs, sizes, budget)
    assert size(found) <= budget * sum(sizes) * (1 + 1e-9)
    assert cost(found) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_equal_costs_are_no_trouble():
    assert len(choose_widths([dict.fromkeys(WIDTHS, 0.0)] * 4, [3] * 4, 3.0)) == 4

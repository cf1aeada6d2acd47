"""Mixed widths under a size budget: the multiple-choice knapsack problem, solved exactly.

One width is chosen per layer, so that the summed cost is least and the codes take no more than the budget. An
integer program of one binary variable per layer and width; HiGHS solves it by branch and bound.
"""

from collections.abc import Mapping, Sequence

import numpy as np


def choose_widths(costs: Sequence[Mapping[int, float]], sizes: Sequence[int], budget: float) -> list[int]:
    """Choose a width per layer.

    Args:
        costs: Per layer, the cost of each width in bits; all layers have the same widths.
        sizes: Number of weights of each layer.
        budget: Bits per weight, on average over all weights.

    Returns:
        The widths. The budget must allow the narrowest.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    widths = list(costs[0])
    cost = np.array([[each[width] for width in widths] for each in costs], dtype=float)
    scale = np.ptp(cost) or 1.0
    shares = np.outer(np.asarray(sizes, dtype=float) / sum(sizes), widths)
    one_each = csr_array(kron(np.eye(len(costs)), np.ones(len(widths))))
    found = milp(
        cost.ravel() / scale,
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(shares.reshape(1, -1), -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    chosen = found.x.reshape(cost.shape).argmax(1)
    return [widths[place] for place in chosen]

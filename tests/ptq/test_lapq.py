"""LAPQ: the steps by norm, and a loss that only the scales together lower."""

import numpy as np
import pytest
import torch

import tiny
from stableqat.layers.linear import quantized_layers
from stableqat.ops import make_grid
from stableqat.ptq.lapq import lapq, norm_scale

ROW = torch.tensor([[0.1, -0.4, 0.7, -1.2, 0.3, -0.05, 0.9, -0.6]])


@pytest.mark.parametrize(("p", "scale"), [(2, 0.6250), (3, 0.6396), (4, 0.6460)])
def test_the_worked_example(p, scale):
    grid, found = make_grid("integer", 2), torch.tensor([[0.6]])
    for _ in range(3):  # each search is finer than the last by its own step only
        found = norm_scale(ROW, found, grid, p)
    assert found.item() == pytest.approx(scale, abs=6e-3)


def test_it_lowers_the_loss_and_leaves_the_best_scales_in_place():
    module = tiny.configured("llama", "ste").eval()
    batch = tiny.batch("llama")

    @torch.no_grad()
    def loss():
        return module.loss(batch).item()

    layers = quantized_layers(module.model)
    before, told = loss(), []
    found = lapq(layers, loss, evaluations=150, tell=lambda count, text: told.append(text))
    assert found < before - 1e-3
    assert loss() == pytest.approx(found, abs=1e-6)
    assert len(told) > 100
    assert np.isfinite(found)

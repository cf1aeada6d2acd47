"""Eager and compiled (`aot_eager`, whole graph) agree bit for bit, forward and backward."""

import pytest
import torch

from stableqat.ops import Fourier, Identity, Tanh, fake_quantize, make_grid


@pytest.mark.parametrize(
    ("surrogate", "grid"),
    [(Identity(), ("stretched", 2)), (Fourier(harmonics=2), ("integer", 3)), (Tanh(), ("ternary", 2))],
    ids=["STE", "StableQAT", "DSQ"],
)
def test_eager_equals_compiled(surrogate, grid):
    torch.manual_seed(0)
    w, upstream = torch.randn(8, 64), torch.randn(8, 64)
    s, logit = torch.rand(8, 4) + 0.2, torch.randn(8, 4)
    s[0, 0] = -1.0  # acts at its floor

    where = make_grid(*grid)

    def quantize(w, s, logit):
        param = logit if isinstance(surrogate, Tanh) else None
        floor = torch.full_like(s, 1e-3)
        options = {"grid": where, "surrogate": surrogate, "surrogate_param": param}
        return fake_quantize(w, s, scale_floor=floor, **options)

    def run(function):
        leaves = [t.clone().requires_grad_() for t in (w, s, logit)]
        value = function(*leaves)
        value.backward(upstream)
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    torch.compiler.reset()
    compiled = torch.compile(quantize, backend="aot_eager", fullgraph=True)
    for eager, other in zip(run(quantize), run(compiled), strict=True):
        assert (eager is None) == (other is None)
        assert eager is None or torch.equal(eager, other)

"""The fused kernels of activations against the torch reference, on a GPU or else in Triton's interpreter.

Values are compared bit for bit, gradients up to the order of a sum.
"""

import pytest
import torch
from kernel_oracle import BF16, DEVICE, FLOAT, HALF

from stableqat.ops import Constant, Fourier, Identity, Permuted, Tanh, inputs, make_grid
from stableqat.ops.inputs import InputOperands, input_gradients, input_value
from stableqat.ops.operands import Spec

pytestmark = pytest.mark.usefixtures("rounding_as_on_a_gpu")

SURROGATES = {
    "ste": Identity(),
    "ste-none": Identity("none"),
    "constant": Constant(),
    "stableqat": Fourier(),
    "stableqat-none": Fourier("none"),
    "stableqat-2": Fourier(amplitude=0.23, harmonics=2),
    "dsq": Tanh(),
}
TENSORS = ["lsq", "lsq+", "floor", "token"]


def operands(kind: str, surrogate) -> InputOperands:
    def one(value: float) -> torch.Tensor:
        return torch.full((1,), value, device=DEVICE)

    logit = one(-1.2) if isinstance(surrogate, Tanh) else None
    return {
        "lsq": InputOperands(one(0.31), one(1e-4), one(-8.0), param=logit),
        "lsq+": InputOperands(one(0.17), one(1e-4), offset=one(-0.43), param=logit),
        "floor": InputOperands(one(0.01), one(0.2), param=logit),
        "token": InputOperands(),
    }[kind]


def sample(shape, dtype, seed=0) -> torch.Tensor:
    """Activations within the codes, beyond them on both sides, and at thresholds."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5
    x.view(-1)[::5] = x.view(-1)[::5].div(0.31).floor().add(0.5) * 0.31
    return x.to(DEVICE, dtype)


def both(monkeypatch, call):
    """What the kernels return, and what plain torch does."""
    assert inputs.input_kernels is not None
    served = []
    for kernels in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(inputs.input_kernels, "kernels_serve", lambda x, kernels=kernels: kernels)
            served.append(call())
    return served


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize(
    ("bits", "shape", "dtype"),
    [(2, (1,), FLOAT), (4, (9, 48), BF16), (8, (2, 5, 64), FLOAT), (4, (2, 1100), HALF)],
    ids=str,
)
def test_value_and_gradients_are_the_references(kind, name, bits, shape, dtype, monkeypatch):
    surrogate = SURROGATES[name]
    if kind == "token" and not name.endswith("-none"):
        return
    given, spec = operands(kind, surrogate), Spec(make_grid("integer", bits), surrogate, dtype)
    x, upstream = sample(shape, dtype), torch.randn(shape, device=DEVICE).to(dtype)
    fused, plain = both(monkeypatch, lambda: input_value(x, given, spec))
    assert fused.dtype == dtype
    assert torch.equal(fused, plain)
    (found, value), (expected, _) = both(
        monkeypatch, lambda: input_gradients(upstream, x, given, spec, with_value=True)
    )
    assert torch.equal(value, plain)
    assert [g is None for g in found] == [g is None for g in expected]
    limit = {FLOAT: 3e-6, BF16: 2**-7, HALF: 2**-10}[dtype]
    torch.testing.assert_close(found[0], expected[0], rtol=limit, atol=1e-6)
    terms = upstream.float().abs().sum().item() * max(spec.grid.q_max, 1) ** 0.5
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        if ours is not None:
            assert ours.shape == theirs.shape
            assert abs(ours - theirs).item() <= 1e-6 * (terms + theirs.abs().item())


def test_many_parts_sum_to_one(monkeypatch):
    """More elements than a part of a tensor holds, and a last part that is not full."""
    spec = Spec(make_grid("integer", 4), Identity(), FLOAT)
    given = operands("lsq+", spec.surrogate)
    monkeypatch.setattr(inputs.input_kernels, "PARTS", 4)
    x = sample((11, 1000), FLOAT)
    (found, _), (expected, _) = both(
        monkeypatch, lambda: input_gradients(torch.ones_like(x), x, given, spec, with_value=False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_far_outside_without_a_mask_no_slope_is_beyond_the_surrogates(monkeypatch):
    spec = Spec(make_grid("integer", 4), Fourier("none"), FLOAT)
    x = (torch.arange(64, device=DEVICE) * 8 + 13e7) * 0.17  # adding rounding's constant drops a digit
    (found, _), _ = both(
        monkeypatch,
        lambda: input_gradients(
            torch.ones_like(x), x, operands("lsq+", spec.surrogate), spec, with_value=False
        ),
    )
    assert found[0].min() > 0
    assert found[0].max() <= 1.001


def test_a_token_of_zeros_stays_zero(monkeypatch):
    spec = Spec(make_grid("integer", 4), Fourier("none"), FLOAT)
    x = torch.zeros(3, 40, device=DEVICE)
    x[1] = 1e30
    fused, plain = both(monkeypatch, lambda: input_value(x, InputOperands(), spec))
    assert torch.equal(fused, plain)
    assert not fused[0].any()


@pytest.mark.parametrize("kind", ["lsq+", "token"])
def test_an_activation_that_is_not_contiguous(kind, monkeypatch):
    spec = Spec(make_grid("integer", 4), Fourier("none"), FLOAT)
    x = sample((24, 8), FLOAT).t()
    fused, plain = both(monkeypatch, lambda: input_value(x, operands(kind, spec.surrogate), spec))
    assert torch.equal(fused, plain)


def test_who_is_served(monkeypatch):
    monkeypatch.setattr(inputs.input_kernels, "kernels_serve", lambda x: True)

    def serves(x, kind="lsq", surrogate=None):
        surrogate = surrogate or Identity("none")
        spec = Spec(make_grid("integer", 4), surrogate, FLOAT)
        return inputs.input_kernels.serve_backward(x, operands(kind, surrogate), spec)

    assert serves(torch.ones(2, 8))
    assert serves(torch.ones(2, 8), "token")
    assert not serves(torch.ones(0, 8))
    assert not serves(torch.ones(2, 8), surrogate=Permuted())
    assert not serves(torch.ones(2, 8), "token", Identity())  # a mask clips; plain torch knows how
    assert not serves(torch.ones(1, 1).expand(2, 20_000), "token")

"""The forward: the plain formula bit for bit, in every type; what is saved; the scale's floor."""

import pytest
import torch
from closed_form import GRIDS, code_range
from hypothesis import given, settings
from hypothesis import strategies as st

from stableqat.ops import (
    Constant,
    Fourier,
    Identity,
    Tanh,
    dequantize_codes,
    fake_quantize,
    make_grid,
    quantize_codes,
)

SURROGATES = [Identity(), Fourier(), Fourier(harmonics=2), Tanh(), Constant()]


def learned(surrogate, scale):
    return torch.full_like(scale, 0.2).logit() if isinstance(surrogate, Tanh) else None


def plain(w, s, name, bits):
    """The formula, with the scale of every weight written out."""
    low, high, z = code_range(name, bits)
    s = s.repeat_interleave(w.shape[1] // s.shape[1], dim=1)
    return s * (torch.clamp(torch.round(w / s + z), low, high) - z)


@settings(max_examples=150, deadline=None)
@given(
    grid=st.sampled_from(GRIDS),
    surrogate=st.sampled_from(SURROGATES),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    n=st.integers(1, 9),
    exponent=st.integers(-30, 20),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_forward_is_the_plain_formula_bitwise(grid, surrogate, rows, groups, n, exponent, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    spread = 2 ** torch.randint(-2, 3, (rows, 1), generator=generator)
    w = torch.randn(rows, groups * n, generator=generator, dtype=dtype) * 2.0**exponent
    s = (torch.rand(rows, groups, generator=generator, dtype=dtype) + 0.1) * 2.0**exponent * spread
    found = fake_quantize(
        w, s, grid=make_grid(*grid), surrogate=surrogate, surrogate_param=learned(surrogate, s)
    )
    assert found.dtype == dtype
    assert torch.equal(found, plain(w, s, *grid))


@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_one_scale_for_the_tensor_and_convolution_shapes(name, bits):
    w, s, grid = torch.randn(4, 3, 2, 2), torch.rand(4, 1) + 0.2, make_grid(name, bits)
    found = fake_quantize(w, s, grid=grid, surrogate=Identity())
    assert torch.equal(found, plain(w.reshape(4, 12), s, name, bits).reshape(w.shape))
    found = fake_quantize(w, s[:1], grid=grid, surrogate=Identity())
    assert torch.equal(found, plain(w.reshape(4, 12), s[:1].expand(4, 1), name, bits).reshape(w.shape))


def test_half_goes_to_even():
    one = torch.ones(1, 1)
    w = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    found = fake_quantize(w, one, grid=make_grid("integer", 4), surrogate=Identity())
    assert found.tolist() == [[-2, -2, 0, 0, 2, 2]]
    w = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])  # thresholds of the stretched grid
    found = fake_quantize(w, one, grid=make_grid("stretched", 3), surrogate=Identity())
    assert found.tolist() == [[-1.5, -1.5, 0.5, 0.5, 2.5]]
    found = fake_quantize(torch.zeros(1, 1), one, grid=make_grid("binary", 1), surrogate=Identity())
    assert found.item() == 0.5


@pytest.mark.parametrize(("name", "bits"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_and_back_equal_the_forward(name, bits, dtype):
    grid = make_grid(name, bits)
    w = (torch.randn(6, 24) * 0.1).to(dtype)
    for s in (torch.rand(6, 1) * 0.1 + 0.01, torch.rand(6, 4) * 0.1 + 0.01, torch.full((1, 1), 0.037)):
        codes = quantize_codes(w, s, grid=grid)
        assert codes.dtype == torch.int8
        assert codes.shape == w.shape
        assert codes.min() >= grid.q_min
        assert codes.max() <= grid.q_max
        value = fake_quantize(w, s, grid=grid, surrogate=Identity())
        assert value.dtype == dtype
        assert torch.equal(dequantize_codes(codes, s, grid.zero_point, dtype), value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_quantized_in_float32(dtype):
    w, s, grid = (torch.randn(6, 64) * 0.1).to(dtype), torch.rand(6, 1) * 0.05 + 0.01, make_grid("integer", 4)
    found = fake_quantize(w, s, grid=grid, surrogate=Fourier())
    assert torch.equal(found, plain(w.float(), s, "integer", 4).to(dtype))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: type(s).__name__)
def test_backward_saves_only_the_tensors_it_was_given(surrogate):
    w, s = torch.randn(16, 64, requires_grad=True), torch.rand(16, 4).add_(0.3).requires_grad_()
    floor = torch.full_like(s, 1e-4)
    param = learned(surrogate, s)
    given_tensors = [t for t in (w, s, floor, param) if t is not None]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = fake_quantize(
            w, s, scale_floor=floor, grid=make_grid("integer", 3), surrogate=surrogate, surrogate_param=param
        )
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in given_tensors}
    assert len(saved) == len(given_tensors)
    value.sum().backward()
    assert w.grad.shape == w.shape


def test_backward_leaves_its_inputs_alone():
    w, s = torch.randn(8, 32, requires_grad=True), torch.rand(8, 1).add_(0.3).requires_grad_()
    upstream = torch.randn(8, 32)
    before = [t.detach().clone() for t in (w, s, upstream)]
    for surrogate in SURROGATES:
        value = fake_quantize(
            w,
            s,
            grid=make_grid("integer", 2),
            surrogate=surrogate,
            surrogate_param=learned(surrogate, s.detach()),
        )
        value.backward(upstream)
    assert all(torch.equal(a, b) for a, b in zip(before, (w, s, upstream), strict=True))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("start", [-1.0, -1e-3, 0.0, 1e-9, 1e-4, 0.5])
def test_floor_of_a_scale(start, sign):
    grid, w = make_grid("integer", 4), torch.full((1, 4), 9.0 * sign)  # beyond the grid: the value is 7 s
    scale = torch.tensor([[start * sign]], requires_grad=True)
    floor = torch.tensor([[1e-4 * sign]])
    value = fake_quantize(w, scale, scale_floor=floor, grid=grid, surrogate=Identity(mask="range"))
    assert value[0, 0].item() == pytest.approx(7 * sign * max(start, 1e-4))
    value.sum().backward()
    # also below the floor, so that the scale can return
    assert scale.grad.item() == pytest.approx(4 * 7 / (4 * 7) ** 0.5)


def test_a_floored_scale_returns():
    scale = torch.tensor([[-0.01]], requires_grad=True)
    w = torch.linspace(-1, 1, 50).reshape(1, 50)
    optimizer = torch.optim.Adam([scale], lr=0.01)
    for _ in range(30):
        floor = torch.tensor([[1e-4]])
        value = fake_quantize(w, scale, scale_floor=floor, grid=make_grid("integer", 2), surrogate=Identity())
        assert value.isfinite().all()
        optimizer.zero_grad()
        (value - w).square().sum().backward()
        optimizer.step()
    assert scale.item() > 0.1


def test_nan_is_loud():
    nan = torch.tensor([[torch.nan]])
    for floor in (None, torch.tensor([[1e-4]])):
        value = fake_quantize(
            torch.ones(1, 4), nan, scale_floor=floor, grid=make_grid("integer", 2), surrogate=Identity()
        )
        assert value.isnan().all()
    w = torch.tensor([[1.0, torch.nan]])
    value = fake_quantize(w, torch.ones(1, 1), grid=make_grid("integer", 2), surrogate=Identity())
    assert value.isnan().tolist() == [[False, True]]

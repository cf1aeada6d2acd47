"""The backward against the float64 closed form: every grid, mask, surrogate and granularity."""

import itertools

import numpy as np
import pytest
import torch
from closed_form import GRIDS, MASKS, code_range, dsq_g, gradient_range, gradients, stableqat_g

from stableqat import ops
from stableqat.ops import Constant, Fourier, Identity, Tanh, fake_quantize, make_grid

SURROGATES = {
    "identity": (lambda m: Identity(m), lambda u, a: np.ones_like(u)),
    "stableqat": (lambda m: Fourier(m, 0.21), lambda u, a: stableqat_g(u, 0.21)),
    "stableqat-3-harmonics": (lambda m: Fourier(m, 0.2, 3), lambda u, a: stableqat_g(u, 0.2, 3)),
    "dsq": (lambda m: Tanh(m), dsq_g),
    "constant": (lambda m: Constant(m, 0.3), lambda u, a: np.full_like(u, 0.3)),
}
ROWS, INPUTS = 6, 48


def sample(name, bits, scale_shape, seed=0):
    """Weights over the whole line: well inside, in the outer half steps, and outside; w, s, a, upstream."""
    rng = np.random.default_rng(seed)
    low, high, z = code_range(name, bits)
    v = rng.uniform(low - z - 1.5, high - z + 1.5, (ROWS, INPUTS))
    v[:, :4] = rng.uniform(
        [low - z - 0.5, high - z, -0.4, high - z + 0.5], [low - z, high - z + 0.5, 0.4, high - z + 9]
    )
    v = rng.permuted(v, axis=1).reshape(*scale_shape, -1)
    s = rng.uniform(0.02, 0.5, (*scale_shape, 1))
    s.reshape(-1)[1::3] *= -1  # turns the grid around
    a = rng.uniform(0.05, 0.9, s.shape)
    bottom, top = gradient_range(name, bits, "range")
    assert ((v > bottom) & (v < top)).any()
    assert (v < bottom).any()
    assert (v > top).any()
    return v * s, s, a, rng.standard_normal(v.shape)


def package(w, s, a, upstream, name, bits, surrogate, dtype=torch.float64):
    """Value and gradients of `fake_quantize`, in the shapes of the closed form."""
    w_ = torch.tensor(w.reshape(ROWS, INPUTS), dtype=dtype, requires_grad=True)
    small = torch.float64 if dtype == torch.float64 else torch.float32
    s_ = torch.tensor(s[..., 0], dtype=small, requires_grad=True)
    a_ = torch.tensor(a[..., 0], dtype=small).logit() if isinstance(surrogate, Tanh) else None
    if a_ is not None:
        a_.requires_grad_()
    value = fake_quantize(w_, s_, grid=make_grid(name, bits), surrogate=surrogate, surrogate_param=a_)
    value.backward(torch.tensor(upstream.reshape(ROWS, INPUTS), dtype=value.dtype))
    return value, w_.grad, s_.grad, None if a_ is None else a_.grad


def closeness(found, expected, tolerance):
    found = found.double().numpy().reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_gradients_of_weight_scale_and_sharpness(name, bits, surrogate):
    make, g = SURROGATES[surrogate]
    for scale_shape, mask in itertools.product([(ROWS, 1), (ROWS, 4), (1, 1)], MASKS):
        w, s, a, upstream = sample(name, bits, scale_shape)
        learned = a if surrogate == "dsq" else None
        expected = gradients(upstream, w, s, name, bits, mask, lambda u, a=a: g(u, a), learned)
        _, by_weight, by_scale, by_a = package(w, s, a, upstream, name, bits, make(mask))
        closeness(by_weight, expected[0], 1e-10)
        closeness(by_scale, expected[1], 1e-10)
        if learned is not None:
            closeness(by_a, expected[2], 1e-9)
        bottom, top = gradient_range(name, bits, mask)
        outside = (w / s < bottom) | (w / s > top)
        assert outside.any() == (mask != "none")
        assert (by_weight.numpy().reshape(w.shape)[outside] == 0).all()


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(("name", "bits"), [("integer", 4), ("stretched", 2), ("ternary", 2), ("binary", 1)])
def test_gradients_in_float32(name, bits, surrogate):
    make, g = SURROGATES[surrogate]
    w, s, a, upstream = (x.astype(np.float32) for x in sample(name, bits, (ROWS, 4)))
    exact = [x.astype(np.float64) for x in (upstream, w, s)]
    learned = a.astype(np.float64) if surrogate == "dsq" else None
    expected = gradients(*exact, name, bits, "range", lambda u: g(u, a.astype(np.float64)), learned)
    _, by_weight, by_scale, by_a = package(w, s, a, upstream, name, bits, make("range"), torch.float32)
    assert by_weight.dtype == by_scale.dtype == torch.float32
    closeness(by_weight, expected[0], 2e-5)
    closeness(by_scale, expected[1], 2e-5)
    if learned is not None:
        closeness(by_a, expected[2], 5e-5)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_bfloat16_weights_over_float32_scales(surrogate):
    """Mathematics runs in float32; only value and weight gradient are rounded to the weight's type."""
    make, _ = SURROGATES[surrogate]
    w, s, a, upstream = sample("integer", 2, (ROWS, 4))
    rounded = [torch.tensor(x).bfloat16().double().numpy() for x in (w, upstream)]
    half = package(rounded[0], s, a, rounded[1], "integer", 2, make("range"), torch.bfloat16)
    full = package(rounded[0], s, a, rounded[1], "integer", 2, make("range"), torch.float32)
    assert half[0].dtype == half[1].dtype == torch.bfloat16
    assert torch.equal(half[0], full[0].bfloat16())
    assert torch.equal(half[1], full[1].bfloat16())
    assert half[2].dtype == torch.float32
    assert torch.equal(half[2], full[2])
    if half[3] is not None:
        assert torch.equal(half[3], full[3])


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_value_and_keeps_float32_gradients(surrogate, dtype):
    make, _ = SURROGATES[surrogate]
    w, s, a, upstream = sample("stretched", 2, (ROWS, 1))
    upstream = torch.tensor(upstream).to(dtype).double().numpy()
    with torch.autocast("cpu", dtype):
        cast = package(w, s, a, upstream, "stretched", 2, make("range"), torch.float32)
    full = package(w, s, a, upstream, "stretched", 2, make("range"), torch.float32)
    assert cast[0].dtype == dtype
    assert torch.equal(cast[0], full[0].to(dtype))
    for got, wanted in zip(cast[1:], full[1:], strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or (got.dtype == torch.float32 and torch.equal(got, wanted))


def at(v, name, bits, surrogate, a=0.2):
    """Weight gradient at v, at scale 1 and upstream 1."""
    w = torch.tensor([[v]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    param = (one * a).logit() if isinstance(surrogate, Tanh) else None
    fake_quantize(w, one, grid=make_grid(name, bits), surrogate=surrogate, surrogate_param=param).backward()
    return w.grad.item()


@pytest.mark.parametrize("v", [-1.5, -0.5, 0.5])
def test_at_a_threshold(v):
    """Ties round to even, and the surrogate is at its top on both sides."""
    assert at(v, "integer", 2, Identity()) == 1
    assert at(v, "integer", 2, Fourier()) == pytest.approx(1)
    assert at(v, "integer", 2, Tanh()) == pytest.approx(1.3733, abs=1e-4)


@pytest.mark.parametrize("v", [-2.0, -1.0, 0.0, -0.0, 1.0])
def test_at_a_level(v):
    assert at(v, "integer", 2, Fourier()) == pytest.approx(0.0347, abs=1e-4)
    assert at(v, "integer", 2, Tanh()) == pytest.approx(0.4944, abs=1e-4)
    assert at(v + 0.5, "stretched", 2, Fourier()) == pytest.approx(0.0347, abs=1e-4)


@pytest.mark.parametrize("mask", ["range", "levels"])
@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_the_ends_of_a_mask_are_inside(name, bits, mask):
    bottom, top = gradient_range(name, bits, mask)
    for surrogate in (Identity(mask), Fourier(mask), Tanh(mask)):
        assert at(bottom, name, bits, surrogate) > 0
        assert at(top, name, bits, surrogate) > 0
        assert at(np.nextafter(bottom, -1e9), name, bits, surrogate) == 0
        assert at(np.nextafter(top, 1e9), name, bits, surrogate) == 0
        assert at(top + 3, name, bits, surrogate) == 0


def test_the_scale_moves_by_the_mask_that_the_weight_has():
    """In the outer half step of the stretched grid the masks disagree, for weight and scale alike."""
    for mask, weight_grad, scale_grad in [
        ("range", 1, 1.5 - 1.8),
        ("levels", 0, 1.5),
        ("none", 1, 1.5 - 1.8),
    ]:
        w = torch.tensor([[1.8]], requires_grad=True)
        s = torch.ones(1, 1, requires_grad=True)
        fake_quantize(w, s, grid=make_grid("stretched", 2), surrogate=Identity(mask)).backward()
        assert w.grad.item() == weight_grad
        assert s.grad.item() == pytest.approx(scale_grad)


@pytest.mark.parametrize("scale_shape", [(ROWS, 1), (ROWS, 4), (1, 1)])
def test_grad_scale_counts_the_weights_that_share_a_scale(scale_shape):
    w = torch.full((ROWS, INPUTS), 1000.0)  # every weight outside, above
    for bits, q_max in ((2, 1), (3, 3), (8, 127)):
        s = torch.ones(scale_shape, requires_grad=True)
        fake_quantize(w, s, grid=make_grid("integer", bits), surrogate=Identity()).sum().backward()
        n = ROWS * INPUTS // (scale_shape[0] * scale_shape[1])
        expected = n * q_max / (n * q_max) ** 0.5
        torch.testing.assert_close(s.grad, torch.full(scale_shape, expected))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amplitude_zero_is_ste_bitwise(mask, dtype):
    for (name, bits), harmonics in itertools.product(GRIDS, (1, 3)):
        data = sample(name, bits, (ROWS, 4))
        stableqat = package(*data, name, bits, Fourier(mask, 0.0, harmonics), dtype)
        ste = package(*data, name, bits, Identity(mask), dtype)
        assert all(torch.equal(x, y) for x, y in zip(stableqat[:3], ste[:3], strict=True))


@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_the_surrogate_never_enters_the_gradient_of_the_scale(name, bits):
    data = sample(name, bits, (ROWS, 4))
    by_scale = [package(*data, name, bits, make("range"))[2] for make, _ in SURROGATES.values()]
    assert all(torch.equal(by_scale[0], other) for other in by_scale[1:])


def test_controls_on_the_same_seam():
    w, s, a, _ = sample("stretched", 2, (ROWS, 4))
    ones = np.ones_like(w)
    ste, stableqat, constant, permuted = (
        package(w, s, a, ones, "stretched", 2, surrogate)[1].reshape(ROWS * 4, -1)
        for surrogate in (Identity("none"), Fourier("none"), Constant("none", 0.3025), ops.Permuted("none"))
    )
    assert torch.equal(constant, 0.3025 * ste)
    assert torch.equal(stableqat.sort(-1).values, permuted.sort(-1).values)  # the same multiset in each group
    assert (stableqat != permuted).double().mean() > 0.8  # in another order

    torch.manual_seed(3)
    first = package(w, s, a, ones, "stretched", 2, ops.Permuted("none"))[1]
    torch.manual_seed(3)
    assert torch.equal(first, package(w, s, a, ones, "stretched", 2, ops.Permuted("none"))[1])


def test_permuted_keeps_the_mask_of_the_weight():
    """The factors are shuffled, the mask is not: weights outside stay still."""
    w, s, a, _ = sample("integer", 2, (ROWS, 1))
    by_weight = package(w, s, a, np.ones_like(w), "integer", 2, ops.Permuted("range"))[1]
    outside = (w / s < -2) | (w / s > 1)
    assert np.array_equal(by_weight.numpy().reshape(w.shape) == 0, outside)


def test_only_the_gradients_that_are_asked_for():
    for weight, scale in itertools.product([True, False], repeat=2):
        if weight or scale:
            w, s = torch.randn(2, 8, requires_grad=weight), torch.ones(2, 1, requires_grad=scale)
            fake_quantize(w, s, grid=make_grid("integer", 2), surrogate=Fourier()).sum().backward()
            assert (w.grad is not None) == weight
            assert (s.grad is not None) == scale

"""Surrogates: published values and moments by quadrature, float32 accuracy, refused amplitudes."""

from math import pi, sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closed_form import dsq_g, dsq_value_by_a, stableqat_g
from hypothesis import given, settings
from hypothesis import strategies as st

from stableqat.errors import UserError
from stableqat.ops import Constant, Fourier, Identity, KernelForm, Permuted, Surrogate, Tanh
from stableqat.ops.dispatch import implementation
from stableqat.ops.surrogates import of_kernel

LIMIT = 1 / (sqrt(2) * pi)  # where g reaches 0 at a level, one harmonic


def moments(surrogate, param=None):
    """Quadrature over the bin (midpoints; exact to far below the printed digits)."""
    n = 200_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5
    g = surrogate.derivative(u, param)
    return {
        "level": surrogate.derivative(torch.zeros(1, dtype=torch.float64), param).item(),
        "threshold": surrogate.derivative(torch.full((1,), 0.5, dtype=torch.float64), param).item(),
        "mean": g.mean().item(),
        "variance": g.var(correction=0).item(),
        "rms": g.square().mean().sqrt().item(),
        "harmonic": (1 / (1 / g).mean()).item(),
        "min": g.min().item(),
        "max": g.max().item(),
    }


STABLEQAT = {
    0.05: (0.6365, 1, 0.7587, 0.0119, 0.767, 0.744),
    0.10: (0.3848, 1, 0.5781, 0.0324, 0.606, 0.530),
    0.15: (0.2002, 1, 0.4369, 0.0522, 0.493, 0.342),
    0.21: (0.0347, 1, 0.3025, 0.0722, 0.405, 0.1135),
}


@pytest.mark.parametrize("amplitude", STABLEQAT)
def test_stableqat_values_and_moments(amplitude):
    found = moments(Fourier(amplitude=amplitude))
    level, threshold, mean, variance, rms, harmonic = STABLEQAT[amplitude]
    assert found["level"] == pytest.approx(level, abs=1e-4)
    assert found["threshold"] == pytest.approx(threshold, abs=1e-12)
    assert found["mean"] == pytest.approx(mean, abs=1e-4)
    assert found["variance"] == pytest.approx(variance, abs=1e-4)
    assert found["rms"] == pytest.approx(rms, abs=5.01e-4)  # three digits are printed
    assert found["harmonic"] == pytest.approx(harmonic, abs=1e-4 if amplitude == 0.21 else 5.01e-4)


def test_stableqat_towards_its_limit():
    found = moments(Fourier(amplitude=LIMIT - 1e-7))
    assert found["level"] == pytest.approx(0, abs=1e-6)
    assert found["mean"] == pytest.approx(4 / pi - 1, abs=1e-4)
    assert found["variance"] == pytest.approx(16 / (3 * pi) - 16 / pi**2, abs=1e-4)
    assert found["rms"] == pytest.approx(0.389, abs=5e-4)
    assert found["harmonic"] < 0.01


@pytest.mark.parametrize(
    ("harmonics", "lowest", "mean", "variance"), [(2, 0.064, 0.232, 0.042), (3, 0.069, 0.206, 0.030)]
)
def test_stableqat_with_more_harmonics(harmonics, lowest, mean, variance):
    found = moments(Fourier(amplitude=0.21, harmonics=harmonics))
    assert found["min"] == pytest.approx(lowest, abs=5e-4)
    assert found["max"] <= found["threshold"] == pytest.approx(1, abs=1e-12)
    assert found["mean"] == pytest.approx(mean, abs=5e-4)
    assert found["variance"] == pytest.approx(variance, abs=5e-4)


DSQ = {
    0.2: (1.373, 0.494, 0.080),
    0.4: (1.155, 0.739, 0.017),
    0.1: (1.636, 0.311, 0.194),
    0.01: (2.67, 0.053, 0.800),
}


def logit(a):
    return torch.tensor(a, dtype=torch.float64).logit()


@pytest.mark.parametrize("a", DSQ)
def test_dsq_values_and_moments(a):
    found = moments(Tanh(a=a), logit(a))
    threshold, level, variance = DSQ[a]
    assert found["mean"] == pytest.approx(1, abs=1e-6)
    assert found["threshold"] == pytest.approx(threshold, abs=5e-3 if a == 0.01 else 5e-4)
    assert found["level"] == pytest.approx(level, abs=5e-4)
    assert found["variance"] == pytest.approx(variance, abs=5e-4)


def test_dsq_mean_stays_one_while_its_variance_grows():
    found = [moments(Tanh(a=a), logit(a)) for a in (1e-2, 1e-4, 1e-6)]
    assert [f["mean"] for f in found] == pytest.approx([1, 1, 1], abs=1e-6)
    assert found[0]["variance"] < found[1]["variance"] < found[2]["variance"]


@pytest.mark.parametrize("surrogate", [Fourier(amplitude=0.21), Fourier(amplitude=0.21, harmonics=3)])
def test_stableqat_is_the_closed_form(surrogate):
    u = torch.linspace(-0.5, 0.5, 4097, dtype=torch.float64)
    expected = stableqat_g(u.numpy(), surrogate.amplitude, surrogate.harmonics)
    np.testing.assert_allclose(surrogate.derivative(u).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("a", [0.9, 0.2, 1e-3])
def test_dsq_is_the_closed_form(a):
    u = torch.linspace(-0.5, 0.5, 4097, dtype=torch.float64)
    np.testing.assert_allclose(Tanh().derivative(u, logit(a)).numpy(), dsq_g(u.numpy(), a), rtol=1e-10)
    by_logit = Tanh().derivatives(u, logit(a))[1].numpy()
    expected = dsq_value_by_a(u.numpy(), a) * a * (1 - a)
    np.testing.assert_allclose(by_logit, expected, rtol=1e-9, atol=1e-12)


def test_dsq_at_a_level_is_smooth():
    """At u = 0 the nearest threshold is half a step away on both sides: no jump from sign(0)."""
    u = torch.tensor([-1e-9, -0.0, 0.0, 1e-9], dtype=torch.float64)
    assert Tanh().derivative(u, logit(0.2)).tolist() == pytest.approx([0.49438] * 4, abs=1e-5)
    # the soft staircase meets the levels for every a
    assert Tanh().derivatives(u, logit(0.2))[1].tolist() == pytest.approx([0] * 4, abs=1e-7)


def ulp_off(got, exact):
    return np.max(np.abs(got.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)))


@pytest.mark.parametrize("amplitude", [0.05, 0.1, 0.21, 0.224])
def test_float32_keeps_its_digits_where_one_minus_s_cancels(amplitude):
    u = np.random.default_rng(0).uniform(-0.5, 0.5, 200_000).astype(np.float32)
    u[:2001] = np.linspace(-1e-3, 1e-3, 2001)
    exact = stableqat_g(u.astype(np.float64), amplitude)
    assert ulp_off(Fourier(amplitude=amplitude).derivative(torch.from_numpy(u)).numpy(), exact) <= 10
    if amplitude == 0.224:  # the plain form would not pass
        s = np.float32(amplitude * sqrt(2) * pi) * np.cos(np.float32(pi) * u)
        assert ulp_off((1 - s) / (1 + s), exact) > 10


@settings(max_examples=50, deadline=None)
@given(u=st.floats(-0.5, 0.5), amplitude=st.floats(0, 0.225), harmonics=st.integers(1, 4))
def test_stableqat_stays_a_damped_positive_factor(u, amplitude, harmonics):
    g = Fourier(amplitude=amplitude, harmonics=harmonics).derivative(torch.tensor([u], dtype=torch.float64))
    assert g.item() == pytest.approx(float(stableqat_g(u, amplitude, harmonics)), rel=1e-9, abs=1e-12)
    assert 0 < g.item() < 2


# the largest S over the bin at A * sqrt(2) * pi = 1: cos 0, cos 45 degrees * 4/3, 1/2 + 1/3 + 1/10
@pytest.mark.parametrize(("harmonics", "peak"), [(1, 1), (2, sqrt(8) / 3), (3, 14 / 15)])
def test_amplitudes_up_to_the_limit_and_no_further(harmonics, peak):
    limit = LIMIT / peak
    assert limit == pytest.approx({1: 0.22508, 2: 0.239, 3: 0.2415}[harmonics], abs=4e-4)
    Fourier(amplitude=limit - 2e-6, harmonics=harmonics)
    with pytest.raises(UserError, match=r"amplitude: at .* gradients vanish or change sign"):
        Fourier(amplitude=limit + 2e-6, harmonics=harmonics)


@pytest.mark.parametrize(
    ("amplitude", "harmonics"),
    [(LIMIT, 1), (0.28658, 1), (0.3, 1), (0.3, 2), (-0.01, 1), (float("nan"), 1), (float("inf"), 1)],
)
def test_refused_amplitudes(amplitude, harmonics):
    with pytest.raises(UserError, match=r"^amplitude: "):
        Fourier(amplitude=amplitude, harmonics=harmonics)


@pytest.mark.parametrize("harmonics", [0, -1])
def test_refused_harmonics(harmonics):
    with pytest.raises(UserError, match=r"^harmonics: "):
        Fourier(harmonics=harmonics)


@pytest.mark.parametrize("a", [0, 1, -0.2, 1.5, float("nan")])
def test_refused_sharpness(a):
    with pytest.raises(UserError, match=r"^a: "):
        Tanh(a=a)


def test_the_sign_flips_over_42_percent_of_the_bin_at_the_fourier_amplitude():
    """Why larger amplitudes are refused: 2 sqrt(2) / pi^2 is the triangle wave's own first harmonic."""
    u = np.linspace(-0.5, 0.5, 100_001)
    assert (stableqat_g(u, 2 * sqrt(2) / pi**2) < 0).mean() == pytest.approx(0.42, abs=5e-3)


def test_controls():
    u = torch.rand(4, 3, 50) - 0.5
    assert Identity().derivative(u) is None
    assert Constant(value=0.3025).derivative(u).unique().tolist() == pytest.approx([0.3025])
    plain, permuted = Fourier().derivative(u), Permuted().derivative(u)
    assert torch.equal(plain.sort(-1).values, permuted.sort(-1).values)  # the same factors in each group
    assert (plain != permuted).float().mean() > 0.9  # in another order
    assert not torch.equal(permuted, Permuted().derivative(u))  # drawn anew in every backward
    correlation = torch.corrcoef(torch.stack([u.abs().flatten(), permuted.flatten()]))[0, 1]
    assert abs(correlation) < 0.2


def test_the_kernel_is_inherited_only_with_the_derivative():
    """A subclass with a derivative of its own runs in torch until it declares what computes the same."""

    class Renamed(Fourier):
        pass

    class Halved(Fourier):
        def derivative(self, u, param=None):
            return super().derivative(u, param) / 2

    class Declared(Halved):
        kernel = KernelForm("constant", (0.5,))

    assert Renamed().kernel == Fourier().kernel == KernelForm("fourier", (0.21, 1))
    assert Halved().kernel is Permuted().kernel is Surrogate().kernel is None
    assert Declared().kernel == KernelForm("constant", (0.5,))


@pytest.mark.parametrize(
    "surrogate", [Identity("none"), Constant("levels", 0.4), Fourier("range", 0.1, 3), Tanh()]
)
def test_a_form_says_all_that_the_derivative_needs(surrogate):
    again = of_kernel(surrogate.kernel, surrogate.mask)
    assert again == surrogate
    assert type(again) is type(surrogate)


def test_a_surrogate_without_a_kernel_runs_in_torch(monkeypatch):
    monkeypatch.setattr("stableqat.ops.dispatch._WANTED", True)
    monkeypatch.setattr("stableqat.ops.dispatch._able", lambda device: True)
    weight = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
    assert [implementation(weight, each) for each in (Fourier(), Permuted())] == ["triton", "torch"]

"""Initial scales: the published errors on Gaussian rows, and what any scale must satisfy."""

import pytest
import torch

from stableqat.ops import dequantize_codes, initial_scale, make_grid, quantize_codes

HOW = ("signed_mse", "mse", "max", "lsq", "absmax_as_step")
GRIDS = [
    ("integer", 2),
    ("integer", 3),
    ("integer", 4),
    ("stretched", 2),
    ("stretched", 4),
    ("ternary", 2),
    ("binary", 1),
]


def relative_mse(w, scale, grid):
    """||w - Q(w)||^2 / ||w||^2 of each row."""
    value = dequantize_codes(quantize_codes(w, scale, grid=grid), scale, grid.zero_point, w.dtype)
    return (value - w).square().sum(1) / w.square().sum(1)


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))


PUBLISHED = {
    ("integer", 2): {"max": 0.278, "absmax_as_step": 0.790, "lsq": 0.221, "mse": 0.150, "signed_mse": 0.147},
    ("stretched", 2): {"max": 0.278, "mse": 0.119},
    ("ternary", 2): {"mse": 0.190},
    ("stretched", 3): {"mse": 0.0375},
    ("stretched", 4): {"mse": 0.0115},
    ("integer", 3): {"max": 0.123, "lsq": 0.071, "mse": 0.041, "absmax_as_step": 0.123},
    ("integer", 4): {"max": 0.0226, "lsq": 0.0303, "mse": 0.0119, "absmax_as_step": 0.0226},
    ("binary", 1): dict.fromkeys(HOW, 0.363),
}


@pytest.mark.parametrize(("name", "bits", "how"), [(*g, how) for g, row in PUBLISHED.items() for how in row])
def test_relative_error_on_gaussian_rows(gaussian, name, bits, how):
    w = gaussian[:128] if how.endswith("mse") else gaussian  # the largest of a row varies most
    grid = make_grid(name, bits)
    error = relative_mse(w, initial_scale(w, (len(w), 1), grid, how), grid).mean().item()
    assert error == pytest.approx(PUBLISHED[name, bits][how], rel=0.03)


def test_closed_forms():
    w = torch.tensor([[0.5, -3.0, 1.0, 0.5]])

    def scale(name, bits, how):
        return initial_scale(w, (1, 1), make_grid(name, bits), how).item()

    assert scale("integer", 2, "max") == 1.5
    assert scale("integer", 3, "max") == scale("integer", 3, "absmax_as_step") == 1.0
    assert scale("integer", 4, "max") == pytest.approx(3 / 7)
    assert scale("stretched", 2, "max") == 1.5
    assert scale("stretched", 3, "max") == 0.75
    assert scale("ternary", 2, "max") == 2.0
    assert scale("integer", 2, "absmax_as_step") == 3.0
    assert scale("integer", 2, "lsq") == 2.5
    assert scale("integer", 4, "lsq") == pytest.approx(2.5 / 7**0.5)
    assert scale("ternary", 2, "lsq") == 2.5
    assert [scale("binary", 1, how) for how in HOW] == [2.5] * 5  # 2 mean|w|


def test_a_range_taken_for_a_step_starts_at_code_zero(gaussian):
    grid = make_grid("integer", 2)
    codes = quantize_codes(gaussian, initial_scale(gaussian, (512, 1), grid, "absmax_as_step"), grid=grid)
    assert 0.91 < (codes == 0).float().mean() < 0.95
    for how in ("signed_mse", "mse", "max", "lsq"):  # every other start uses its levels
        codes = quantize_codes(gaussian, initial_scale(gaussian, (512, 1), grid, how), grid=grid)
        assert (codes == 0).float().mean() < 0.65


def heavy_tailed(rows, n):
    w = torch.distributions.StudentT(torch.tensor(3.0)).sample((rows, n))
    w[::4, 0] = 40.0  # and a lone outlier here and there
    return w


@pytest.mark.parametrize(("name", "bits"), GRIDS)
@pytest.mark.parametrize("rows", ["gaussian", "uniform", "heavy_tailed", "short"])
def test_mse_comes_close_to_a_brute_force_search(name, bits, rows):
    torch.manual_seed(0)
    shapes = {
        "gaussian": torch.randn(16, 256),
        "uniform": torch.rand(16, 256) - 0.5,
        "short": torch.randn(64, 16),
    }
    w = shapes.get(rows, heavy_tailed(16, 256)) * 0.02
    grid = make_grid(name, bits)
    found = relative_mse(w, initial_scale(w, (len(w), 1), grid, "mse"), grid)
    tops = w.abs().amax(1, keepdim=True) / grid.outermost
    candidates = [relative_mse(w, tops * t, grid) for t in torch.linspace(0.02, 1.3, 200)]
    best = torch.stack(candidates).amin(0)
    assert (found.mean() / best.mean()).item() < (1.08 if rows == "short" else 1.02)
    for how in ("max", "lsq"):
        assert (found <= relative_mse(w, initial_scale(w, (len(w), 1), grid, how), grid) * 1.1).all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_a_power_of_two_carries_over(name, bits, how):
    w = torch.randn(8, 64)
    grid = make_grid(name, bits)
    scale = initial_scale(w, (8, 4), grid, how)
    assert torch.equal(initial_scale(w * 2.0**-9, (8, 4), grid, how), scale * 2.0**-9)


@pytest.mark.parametrize("how", HOW)
def test_a_group_is_a_row_of_its_own(how):
    w, grid = torch.randn(6, 64), make_grid("integer", 3)
    groups = initial_scale(w, (6, 4), grid, how)
    rows = initial_scale(w.reshape(24, 16), (24, 1), grid, how)
    torch.testing.assert_close(groups.flatten(), rows.flatten(), rtol=0, atol=0)
    tensor = initial_scale(w, (1, 1), grid, how)
    torch.testing.assert_close(tensor, initial_scale(w.reshape(1, -1), (1, 1), grid, how), rtol=0, atol=0)


def test_rows_do_not_depend_on_how_many_there_are():
    """The search runs over chunks of rows: the seams must not show."""
    w, grid = torch.randn(140_000, 8), make_grid("stretched", 2)
    scale = initial_scale(w, (140_000, 1), grid, "mse")
    some = [0, 1, 131_071, 131_072, 139_999]
    assert scale.shape == (140_000, 1)
    torch.testing.assert_close(scale[some], initial_scale(w[some], (5, 1), grid, "mse"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_rows_of_zeros_and_constants(name, bits, how):
    w = torch.randn(4, 32)
    w[1] = 0.0
    w[2] = 0.25
    w[3, 1:] = 0.0  # a single weight in the row
    scale = initial_scale(w, (4, 1), make_grid(name, bits), how).abs()
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert scale[1].item() == pytest.approx(scale[[0, 2, 3]].mean().item())  # the mean of the others
    nothing = initial_scale(torch.zeros(4, 32), (4, 1), make_grid(name, bits), how)
    assert (nothing > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", HOW)
def test_scales_are_float32_whatever_the_weight(dtype, how):
    w, grid = torch.randn(8, 64).to(dtype), make_grid("integer", 2)
    scale = initial_scale(w, (8, 1), grid, how)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, initial_scale(w.float(), (8, 1), grid, how), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_sign_is_that_of_the_smaller_error(gaussian, bits):
    w, grid = gaussian[:64].clone(), make_grid("integer", bits)
    w[0, 0], w[1, 0] = 30.0, -30.0  # the long side of the grid is for the outlier
    signed = initial_scale(w, (64, 1), grid, "signed_mse")
    errors = [relative_mse(w, initial_scale(w * s, (64, 1), grid, "mse") * s, grid) for s in (1, -1)]
    assert torch.equal(relative_mse(w, signed, grid), torch.minimum(*errors))
    assert (signed[1] > 0) & (signed[0] < 0)


def test_signs_let_the_offsets_of_rows_cancel(gaussian):
    """A positive scale takes from the sum of each row; signs take from some and give to others."""
    grid = make_grid("integer", 2)

    def offsets(how):
        scale = initial_scale(gaussian, (512, 1), grid, how)
        value = dequantize_codes(quantize_codes(gaussian, scale, grid=grid), scale, 0, gaussian.dtype)
        return (value - gaussian).sum(1) / gaussian.abs().sum(1)

    assert (offsets("mse") < 0).all()
    assert offsets("mse").mean() < -0.06
    assert offsets("signed_mse").mean().abs() < 0.01


@pytest.mark.parametrize("name", ["stretched", "ternary", "binary"])
def test_symmetric_grids_need_no_sign(gaussian, name):
    grid = make_grid(name, 1 if name == "binary" else 2)
    either = [initial_scale(gaussian[:8], (8, 1), grid, how) for how in ("mse", "signed_mse")]
    assert torch.equal(*either)

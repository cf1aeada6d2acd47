"""GPTQ by hand, against exhaustive search, and where calibration tells little."""

from functools import partial

import pytest
import torch

from stableqat import ops
from stableqat.ptq.adaround import adaround
from stableqat.ptq.gptq import gptq
from stableqat.ptq.moments import Moments
from stableqat.quantizers import STE

H = torch.tensor([[4.0, 2, 1], [2, 3, 1], [1, 1, 2]])


def unit(weight, bits=4, **options):
    """A quantizer whose levels are the integers."""
    quantizer = STE(weight, bits=bits, **options)
    quantizer.scale.data.fill_(1.0)
    quantizer.scale_floor.data.fill_(1e-6)
    return quantizer


@pytest.mark.parametrize(
    ("row", "codes", "error", "nearest"),
    [((0.4, 0.4, 0.4), (0, 1, 0), 0.92, 2.72), ((0.45, 0.4, -0.3), (0, 1, 0), 1.08, 1.68)],
)
def test_the_worked_example(row, codes, error, nearest):
    weight = torch.tensor([row])
    made = gptq(weight, H, unit(weight), damping=0.0)
    assert made.weight.codes.tolist() == [list(codes)]
    assert made.error == pytest.approx(error, abs=2e-3)
    assert made.nearest == pytest.approx(nearest, abs=2e-3)


def correlated(inputs, rows=64, seed=0):
    """A second moment whose inputs depend on one another, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.linspace(2, 0.1, inputs)
    moment = Moments(inputs, torch.device("cpu"))
    x = torch.randn(rows, inputs, generator=generator) @ mix
    for part in x.split(7):
        moment.add(part)
    assert torch.allclose(moment.hessian, 2 / rows * x.T @ x, rtol=1e-4, atol=1e-4)
    return moment.hessian, x


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_beats_rounding_to_nearest_by_far(bits, act_order, group_size):
    hessian, x = correlated(256, rows=1024)
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    quantizer = STE(weight, bits=bits, group_size=group_size)
    made = gptq(weight, hessian, quantizer, act_order=act_order)
    assert made.error < 0.7 * made.nearest
    value = made.weight.dequantize()
    measured = 2 / len(x) * (x @ (weight - value).T).square().sum().item()
    assert made.error == pytest.approx(measured, rel=1e-3)
    settled = weight.clone()
    quantizer.settle(settled, made.weight)  # any run holds it
    assert torch.equal(quantizer.quantize(settled).dequantize(), value)


def test_one_input_after_the_other_is_the_textbook():
    """Without blocks and orders: optimal brain surgery, with the inverse of what is left, step by step."""
    hessian, _ = correlated(160)
    weight = torch.randn(5, 160, generator=torch.Generator().manual_seed(2))
    quantizer = STE(weight, bits=3)
    made = gptq(weight, hessian, quantizer, act_order=False)
    h = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    w, scale = weight.double(), quantizer.effective_scale().double()
    left = list(range(160))
    for i in range(160):
        inverse = torch.linalg.inv(h[left][:, left])
        code = ops.quantize_codes(w[:, i : i + 1].float(), scale.float(), grid=quantizer.grid)
        error = (w[:, i : i + 1] - code * scale) / inverse[0, 0]
        w[:, left] -= error * inverse[0]
        w[:, i : i + 1] = code * scale
        left = left[1:]
    assert (made.weight.dequantize().double() - w).abs().gt(1e-5).double().mean() < 0.01


def test_groups_take_their_scales_from_weights_that_are_up_to_date():
    """Also where a group does not begin where a block of inputs does: 96 is no divisor of 128."""
    hessian, _ = correlated(288, rows=2048)
    weight = torch.randn(4, 288, generator=torch.Generator().manual_seed(5))
    quantizer = STE(weight, bits=3, group_size=96)
    made = gptq(weight, hessian, quantizer, act_order=False)
    inverse = torch.linalg.inv(hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(288))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    w, scale = weight.clone(), quantizer.effective_scale().clone()
    for i in range(288):  # without blocks
        group = slice(i // 96, i // 96 + 1)
        if i % 96 == 0:
            scale[:, group] = ops.initial_scale(w[:, i : i + 96], (4, 1), quantizer.grid, "signed_mse")
        code = ops.quantize_codes(w[:, i : i + 1], scale[:, group], grid=quantizer.grid)
        error = (w[:, i : i + 1] - code * scale[:, group]) / factor[i, i]
        w[:, i:] -= error * factor[i, i:]
    assert torch.allclose(made.weight.scale, scale, rtol=1e-3)
    assert not torch.allclose(made.weight.scale, quantizer.effective_scale(), rtol=1e-2)


@pytest.mark.parametrize("method", [gptq, partial(adaround, steps=200)])
def test_negative_scales(method):
    """A grid that is turned around is the same problem as the negated row on the grid as it is."""
    hessian, _ = correlated(64, rows=512)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(6))
    results = []
    for sign in (1, -1):
        quantizer = STE(weight, bits=2, scale_init="mse")
        quantizer.scale.data *= sign
        quantizer.scale_floor.data *= sign
        results.append(method(weight * sign, hessian, quantizer))
    own, turned = results
    assert torch.equal(own.weight.codes, turned.weight.codes)
    assert turned.error == pytest.approx(own.error, rel=1e-5)
    assert turned.error < turned.nearest


def test_inputs_that_calibration_never_reaches_are_rounded_to_nearest():
    hessian, _ = correlated(64)
    hessian[:, 10:20] = hessian[10:20] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    quantizer = STE(weight, bits=3)
    made = gptq(weight, hessian, quantizer)
    assert made.unseen == 10
    assert torch.equal(made.weight.codes[:, 10:20], quantizer.quantize(weight).codes[:, 10:20])


def test_too_few_inputs_take_more_damping():
    hessian, _ = correlated(64, rows=3)
    weight = torch.randn(8, 64)
    made = gptq(weight, hessian, STE(weight, bits=3), damping=0.0)
    assert 0 < made.damping < 0.1
    assert made.error < made.nearest


@pytest.mark.parametrize("options", [{"grid": "stretched", "bits": 2}, {"levels": 3}, {"bits": 1}])
def test_every_grid(options):
    hessian, _ = correlated(96, rows=512)
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(4))
    make = partial(STE, **options)
    made = gptq(weight, hessian, make(weight))
    assert made.error < made.nearest
    quantizer, settled = make(weight), weight.clone()
    quantizer.settle(settled, made.weight)
    assert torch.equal(quantizer.quantize(settled).dequantize(), made.weight.dequantize())

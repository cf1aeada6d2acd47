"""AdaRound by hand, and against rounding to nearest."""

from math import log

import pytest
import torch
from test_gptq import correlated

from stableqat.ptq.adaround import adaround, penalty, soft, start
from stableqat.quantizers import STE


def test_the_worked_example():
    v = start(torch.tensor([0.3]))
    assert v.item() == pytest.approx(-log(2), rel=1e-5)
    assert soft(v).item() == pytest.approx(0.3, rel=1e-5)
    assert penalty(torch.tensor([0.3]), 2.0).item() == pytest.approx(0.0084, rel=1e-4)
    assert penalty(torch.tensor([0.3]), 20.0).item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"bits": 2}, {"bits": 4, "group_size": 32}, {"grid": "stretched", "bits": 2}]
)
def test_it_beats_rounding_to_nearest(options):
    hessian, x = correlated(64, rows=512)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    quantizer = STE(weight, **options)
    made = adaround(weight, hessian, quantizer, steps=400)
    assert made.error < 0.8 * made.nearest
    difference = weight - made.weight.dequantize()
    assert made.error == pytest.approx(2 / len(x) * (x @ difference.T).square().sum().item(), rel=1e-3)
    settled = weight.clone()
    quantizer.settle(settled, made.weight)
    assert torch.equal(quantizer.quantize(settled).dequantize(), made.weight.dequantize())


def test_each_weight_lands_on_a_neighbour():
    hessian, _ = correlated(32, rows=256)
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    quantizer = STE(weight, bits=4, scale_init="max")
    codes = adaround(weight, hessian, quantizer, steps=300).weight.codes
    v = weight / quantizer.effective_scale()
    assert ((codes == v.floor().clamp(-8, 7)) | (codes == v.ceil().clamp(-8, 7))).all()

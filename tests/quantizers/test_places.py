"""The controls compute in training where they say, with STE's gradients, and deploy what STE deploys."""

import pytest
import torch

from stableqat.quantizers import STE, STEAtNoise, STEAtRandomRounding, STEAtWeight

CONTROLS = [STEAtWeight, STEAtRandomRounding, STEAtNoise]
GRANULARITIES = [{}, {"group_size": 8}, {"per_channel": False}]
each = pytest.mark.parametrize("control", CONTROLS, ids=lambda c: c.__name__)
granular = pytest.mark.parametrize("options", GRANULARITIES, ids=str)


def make_weight():
    return (torch.randn(6, 64) * 0.05).requires_grad_()


@each
@granular
def test_gradients_are_those_of_ste(control, options):
    weight, upstream = make_weight(), torch.randn(6, 64)
    found = []
    for method in (control, STE):
        quantizer = method(weight, bits=2, **options).train()
        weight.grad = None
        (quantizer(weight) * upstream).sum().backward()
        found.append((weight.grad.clone(), quantizer.scale.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert (found[0][0] == 0).any()  # the mask


@each
@granular
def test_evaluated_and_deployed_they_are_ste(control, options):
    weight = make_weight()
    ours, ste = (method(weight, bits=2, **options).eval() for method in (control, STE))
    assert torch.equal(ours(weight), ste(weight))
    assert torch.equal(ours.quantize(weight).codes, ste.quantize(weight).codes)
    assert not torch.equal(ours.train()(weight), ste(weight))


def test_at_the_weight():
    weight = make_weight()
    assert torch.equal(STEAtWeight(weight, bits=2).train()(weight), weight)


@granular
def test_random_rounding_is_to_a_neighbour_and_keeps_the_mean(options):
    weight = make_weight()
    quantizer = STEAtRandomRounding(weight, bits=3, **options).train()
    scale = quantizer.effective_scale()
    steps = scale.repeat_interleave(64 // scale.shape[1], 1).expand(6, 64)
    draws = torch.stack([quantizer(weight).detach() for _ in range(4000)])
    codes = draws / steps
    assert ((codes - codes.round()).abs() < 1e-4).all()
    inside = (weight / steps > -4) & (weight / steps < 3)
    assert ((draws - weight).abs() / steps.abs())[:, inside].max() <= 1 + 1e-4
    off = (draws.mean(0) - weight) / steps
    assert off[inside].abs().max() < 5 * 0.5 / 4000**0.5


@granular
def test_noise_is_as_long_as_the_rounding_error(options):
    weight = make_weight()
    quantizer = STEAtNoise(weight, bits=2, **options).train()
    groups = (*quantizer.scale.shape, -1)
    away, again = ((quantizer(weight) - weight).detach().reshape(groups) for _ in range(2))
    error = (quantizer.eval()(weight) - weight).detach().reshape(groups)
    torch.testing.assert_close(away.norm(dim=-1), error.norm(dim=-1))
    assert not torch.equal(away, again)

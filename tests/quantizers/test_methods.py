"""What makes each method itself: defaults, learned parameters, and the controls between them."""

import io

import pytest
import torch
from torch import nn

from stableqat.ops import Constant, Fourier, Identity, Permuted
from stableqat.quantizers import DSQ, STE, ParetoQ, Quantizer, StableQAT


def weight_of(rows=16, inputs=64, seed=0):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def train(quantizer, weight, steps=25, lr=0.02):
    """A few steps towards a target; returns the losses."""
    weight = nn.Parameter(weight.detach().clone())
    target = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([weight, *(p for p in quantizer.parameters() if p.requires_grad)], lr=lr)
    losses = []
    for _ in range(steps):
        loss = (quantizer(weight) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, weight.detach(), quantizer.scale.detach()


def same(a, b):
    return a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_paretoq_is_ste_where_the_grids_agree(bits):
    """The A/A control: equal to the last bit over training."""
    weight = weight_of()
    assert same(train(ParetoQ(weight, bits=bits), weight), train(STE(weight, bits=bits), weight))


def test_paretoq_differs_at_two_bits_by_its_grid_alone():
    weight = weight_of()
    paretoq = train(ParetoQ(weight, bits=2), weight)
    assert not same(paretoq, train(STE(weight, bits=2), weight))
    assert same(paretoq, train(STE(weight, bits=2, grid="stretched"), weight))


@pytest.mark.parametrize(
    ("bits", "levels", "n"), [(2, None, 2.0), (3, None, 4.0), (None, 3, 1.5), (1, None, None)]
)
def test_paretoqs_own_range_formula(bits, levels, n):
    """alpha * (round(clip(w/alpha, -.99, .99) * n - 1/2) + 1/2) / n, ternary without the shift."""
    weight = weight_of().detach()
    quantizer = ParetoQ(weight, bits=bits, levels=levels, grid="stretched" if bits == 3 else None)
    scale = quantizer.scale.detach()
    if n is None:
        expected = scale / 2 * torch.where(weight < 0, -1.0, 1.0)
    else:
        alpha, shift = scale * n, 0.0 if levels == 3 else 0.5
        clipped = (weight / alpha).clamp(-0.99, 0.99)
        expected = alpha * (torch.round(clipped * n - shift) + shift) / n
    torch.testing.assert_close(quantizer(weight), expected, rtol=1e-5, atol=1e-6)


def test_amplitude_zero_is_ste_over_training():
    weight = weight_of()
    for bits in (1, 2, 4):
        ste = train(STE(weight, bits=bits), weight)
        assert same(train(StableQAT(weight, bits=bits, amplitude=0.0), weight), ste)
        assert not same(train(StableQAT(weight, bits=bits), weight), ste)


def test_defaults_are_the_published_ones():
    weight = weight_of()
    assert STE(weight, bits=2).surrogate == Identity("range")
    assert ParetoQ(weight, bits=2).surrogate == Identity("range")
    assert StableQAT(weight, bits=2).surrogate == Fourier("range", amplitude=0.21, harmonics=1)
    torch.testing.assert_close(DSQ(weight, bits=2).surrogate_param().sigmoid(), torch.full((16, 1), 0.2))


def test_the_options_of_a_method_show_in_its_description():
    weight = weight_of()
    stableqat = StableQAT(weight, bits=2, amplitude=0.1, harmonics=2, mask="levels").describe()
    assert (stableqat["amplitude"], stableqat["harmonics"], stableqat["mask"]) == (0.1, 2, "levels")
    assert DSQ(weight, bits=2, a=0.4).describe()["a"] == 0.4
    assert ParetoQ(weight, bits=2).describe()["grid"] == "stretched"


@pytest.mark.parametrize(("mask", "cut"), [("levels", 0.136), ("range", 0.05), ("none", 0.0)])
def test_masks_matter(mask, cut):
    """At mse initialisation on the stretched 2-bit grid, share of Gaussian weights without gradient."""
    weight = weight_of(256, 2048)
    quantizer = STE(weight, bits=2, grid="stretched", mask=mask)
    quantizer(weight).sum().backward()
    assert (weight.grad == 0).float().mean().item() == pytest.approx(
        cut, abs=0.005 if mask == "range" else 0.002
    )


def test_absmax_as_step_begins_at_code_zero_in_every_method():
    weight = weight_of(64, 2048).detach()
    for method in (STE, DSQ, StableQAT):
        codes = method(weight, bits=2, scale_init="absmax_as_step").quantize(weight).codes
        assert 0.91 < (codes == 0).float().mean() < 0.95


@pytest.mark.parametrize("group_size", [None, 16])
def test_sharpness_of_dsq_is_learned_through_a_logit(group_size):
    weight = weight_of().detach()
    dsq = DSQ(weight, bits=2, a=0.3, group_size=group_size)
    assert dsq.a_logit.shape == dsq.scale.shape
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    dsq(weight).backward(upstream)

    # the soft staircase in float64, differentiated by finite differences in the logit
    scale = dsq.scale.detach().double()
    n = weight.numel() // scale.numel()
    v = weight.double().reshape(*scale.shape, n) / scale.unsqueeze(-1)
    u = v - v.round()
    t = u - torch.where(u >= 0, 0.5, -0.5)
    inside = (v >= -2) & (v <= 1)

    def soft(logit):
        a = torch.tensor(logit, dtype=torch.float64).sigmoid()
        phi = torch.tanh(torch.log(2 / a - 1) * t) / (1 - a)
        return (upstream.double().reshape(v.shape) * inside * phi / 2).sum(-1) * scale

    logit = torch.tensor(0.3).logit().item()
    expected = (soft(logit + 1e-5) - soft(logit - 1e-5)) / 2e-5 / n**0.5  # grad_scale: q_max is 1
    torch.testing.assert_close(dsq.a_logit.grad.double(), expected, rtol=1e-3, atol=1e-5)


def test_sharpness_of_dsq_stays_inside_by_construction():
    weight = weight_of()
    dsq = DSQ(weight, bits=2)
    with torch.no_grad():
        dsq.a_logit[0], dsq.a_logit[1] = 12.0, -12.0
    dsq(weight).square().sum().backward()
    assert weight.grad.isfinite().all()
    assert dsq.a_logit.grad.isfinite().all()


def test_dsq_trains_at_a_large_step_without_nan():
    weight = weight_of()
    dsq = DSQ(weight, bits=2)
    losses, weight, _ = train(dsq, weight, steps=200, lr=0.3)
    assert torch.tensor(losses).isfinite().all()
    assert dsq(weight).isfinite().all()
    assert dsq.a_logit.isfinite().all()


@pytest.mark.parametrize(
    "surrogate", [Constant("range", 0.3025), Permuted("range", 0.21)], ids=["constant", "permuted"]
)
def test_controls_are_one_liners(surrogate):
    """A method is a class that brings its surrogate."""

    class Control(Quantizer):
        def __init__(self, weight, **options):
            super().__init__(weight, surrogate=surrogate, **options)

    weight, reference = weight_of(), weight_of()
    control, stableqat = (
        cls(w, bits=2, group_size=16) for cls, w in ((Control, weight), (StableQAT, reference))
    )
    assert torch.equal(control(weight), stableqat(reference))
    upstream = torch.randn(weight.shape)
    control(weight).backward(upstream)
    stableqat(reference).backward(upstream)
    assert torch.equal(control.scale.grad, stableqat.scale.grad)
    assert not torch.equal(weight.grad, reference.grad)
    assert torch.equal(weight.grad == 0, reference.grad == 0)  # the mask is the same
    file = io.BytesIO()
    torch.save(control.state_dict(), file)
    file.seek(0)
    Control(weight, bits=2, group_size=16).load_state_dict(torch.load(file, weights_only=True))


def test_a_constant_factor_changes_nothing_under_a_scale_free_optimizer():
    """Adam without eps divides it out: why the control of AdamW runs is STE at the same rate."""
    weight = weight_of()

    class Any(Quantizer):
        def __init__(self, surrogate):
            super().__init__(weight, surrogate=surrogate, bits=2)

    def signs(surrogate):
        quantizer = Any(surrogate)
        latent = nn.Parameter(weight.detach().clone())
        optimizer = torch.optim.Adam([latent], lr=0.01, eps=0.0)
        for _ in range(10):
            optimizer.zero_grad()
            (quantizer(latent) - 1).square().sum().backward()
            latent.grad[latent.grad == 0] = 1e-30  # masked weights would be 0 / 0
            optimizer.step()
        return quantizer.quantize(latent).codes

    assert torch.equal(signs(Constant("range", 0.25)), signs(Identity("range")))

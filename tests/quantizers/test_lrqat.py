"""LR-QAT: its formula, with the figures of the paper's recipe, and the byte that it keeps of each weight."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stableqat
from stableqat.errors import UserError
from stableqat.layers.full_precision import full_precision
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import LRQAT, STE
from stableqat.surgery import quantize_linears


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(weight, scale=1.0, start=None, **options):
    """A quantizer whose start was taken in steps of `start`, and whose scale is now another."""
    quantizer = LRQAT(weight, **options)
    with torch.no_grad():
        quantizer.initial_scale.fill_(scale if start is None else start)
        quantizer.scale.fill_(scale)
        quantizer.scale_floor.copy_(quantizer.scale * 1e-4)
    return quantizer


def learned(quantizer, size=0.5):
    with torch.no_grad():
        quantizer.factor_a.normal_(std=size)
    return quantizer


def test_the_start_is_kept_in_eight_bits():
    """4 bits leave 4 for the fraction, 2 bits leave 6."""
    four = made(torch.tensor([[2.37, -9.0, 7.6, 0.02, -0.04]]), bits=4)
    phi = four.stored(torch.tensor([[2.37, -9.0, 7.6, 0.02, -0.04]]))
    assert phi.dtype == torch.int8
    assert (phi / 16).tolist() == [[2.375, -8.0, 7.0, 0.0, -0.0625]]
    two = made(torch.tensor([[1.49, -1.3]]), bits=2)
    assert (two.stored(torch.tensor([[1.49, -1.3]])) / 64).tolist() == [[1.0, -1.296875]]
    assert torch.equal(four.stored(phi), phi)


def test_the_change_moves_codes():
    weight = torch.tensor([[2.37, -1.0]])
    quantizer = made(weight, bits=4, rank=1)
    assert quantizer.quantize(weight).codes.tolist() == [[2, -1]]
    with torch.no_grad():
        quantizer.factor_a.fill_(1.0)
        quantizer.factor_b.copy_(torch.tensor([[0.2, 0.2]]))
    assert quantizer.quantize(weight).codes.tolist() == [[3, -1]]
    quantizer.alpha = 0.5  # half of it leaves 2.475
    assert quantizer.quantize(weight).codes.tolist() == [[2, -1]]


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"bits": 2, "grid": "stretched"}, {"levels": 3}, {"bits": 1}]
)
@pytest.mark.parametrize("shape", [{}, {"group_size": 8}])
def test_forward_and_gradients_are_the_formula(options, shape):
    weight = torch.randn(6, 32)
    quantizer = learned(LRQAT(weight, rank=4, alpha=6.0, **options, **shape))
    with torch.no_grad():
        quantizer.scale.mul_(1.3)  # the start stays in steps of the first scale
    grid = quantizer.grid
    a, b = (p.detach().clone().requires_grad_(True) for p in (quantizer.factor_a, quantizer.factor_b))
    scale = quantizer.scale.detach().clone().requires_grad_(True)
    each = 32 // scale.shape[1]
    by_weight = [s.repeat_interleave(each, 1) for s in (quantizer.initial_scale, scale)]
    phi = (weight / by_weight[0] + grid.zero_point).clamp(grid.q_min, grid.q_max)
    phi = (phi * 2 ** (8 - grid.bits)).round() / 2 ** (8 - grid.bits)
    latent = phi.detach() + 6 / 4 * (a @ b)
    low, high = (end + grid.zero_point for end in grid.bounds("range"))
    codes = latent.round().clamp(grid.q_min, grid.q_max)
    through = latent.clamp(low, high)
    value = by_weight[1] * (codes.detach() - grid.zero_point + (through - through.detach()))

    assert torch.equal(quantizer(weight), value)
    assert torch.equal(quantizer.quantize(weight).codes, codes.to(torch.int8))
    upstream = torch.randn_like(weight)
    quantizer(weight).backward(upstream)
    value.backward(upstream)
    torch.testing.assert_close(quantizer.factor_a.grad, a.grad)
    torch.testing.assert_close(quantizer.factor_b.grad, b.grad)
    # q - z for every weight, with LSQ's factor; plain STE has q - z - v
    torch.testing.assert_close(quantizer.scale.grad, scale.grad / (each * max(grid.q_max, 1)) ** 0.5)


def test_codes_do_not_move_with_the_scale():
    weight = torch.randn(8, 64)
    quantizer = LRQAT(weight, bits=4)
    before = quantizer.quantize(weight).codes
    with torch.no_grad():
        quantizer.scale.mul_(torch.rand(8, 1) + 0.5)
    assert torch.equal(quantizer.quantize(weight).codes, before)


def test_at_first_it_rounds_as_ste_up_to_the_eighth_bit():
    weight = torch.randn(64, 256)
    codes = [method(weight, bits=4).quantize(weight).codes for method in (LRQAT, STE)]
    assert (codes[0] != codes[1]).float().mean() < 1 / 16
    assert (codes[0] - codes[1]).abs().max() <= 1


def test_a_stored_weight_is_the_same_in_a_byte():
    weight = torch.randn(16, 32)
    quantizer = learned(LRQAT(weight, bits=3, group_size=8))
    stored = quantizer.stored(weight)
    assert torch.equal(quantizer(stored), quantizer(weight))
    assert torch.equal(quantizer.latent(stored), quantizer.latent(weight))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        value = quantizer.to(dtype)(stored)
        assert value.dtype == dtype
        assert torch.equal(value, quantizer.quantize(stored).dequantize())


def test_a_new_latent_weight_starts_afresh():
    weight = torch.randn(16, 32)
    quantizer = learned(LRQAT(weight, bits=4))
    for own in (weight.clone(), quantizer.stored(weight)):
        latent = quantizer.latent(own).detach()
        with torch.no_grad():
            quantizer.scale.mul_(1.1)
            quantizer.set_latent(own, latent)
        assert quantizer.factor_a.count_nonzero() == 0
        in_steps = (latent / quantizer.scale).clamp(-8, 7)
        assert (quantizer.in_steps(own) - in_steps).abs().max() < 0.5 / 16 + 1e-5
        learned(quantizer)


def net():
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 4))


def steps(model, count, lr=1e-2):
    optimizer = torch.optim.AdamW(stableqat.parameter_groups(model, lr=lr))
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    y = (x[:, :4] * x[:, 4:8]).sign()
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_prepare_trains_what_convert_deploys():
    model = stableqat.prepare(net(), "LRQAT", skip="4", bits=4, rank=8, example_inputs=torch.randn(2, 24))
    frozen = {n: layer.weight.clone() for n, layer in quantized_layers(model).items()}
    assert all(weight.dtype == torch.int8 for weight in frozen.values())
    losses = steps(model, 60)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert all(torch.equal(layer.weight, frozen[n]) for n, layer in quantized_layers(model).items())
    x = torch.randn(8, 24)
    answer = model.eval()(x)
    with full_precision(model):
        whole = model(x)
    assert not torch.equal(whole, answer)
    plain = stableqat.convert(copy.deepcopy(model))
    assert torch.equal(plain(x), answer)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in plain.parameters())


def test_full_precision_is_the_latent_weight():
    model = stableqat.prepare(net(), "LRQAT", bits=8, skip=(), example_inputs=torch.randn(2, 24))
    steps(model, 3)
    latent = copy.deepcopy(net())
    latent.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    for name, layer in quantized_layers(model).items():
        latent.get_submodule(name).weight.data = layer.weight_quantizer.latent(layer.weight).detach()
    x = torch.randn(8, 24)
    with full_precision(model):
        assert torch.equal(model(x), latent(x))


@pytest.mark.parametrize("recompute", [None, False])
def test_the_backward_computes_the_weight_again_unless_told_not_to(recompute):
    model = net()
    quantize_linears(model, partial(LRQAT, bits=4), skip=["2", "4"], recompute=recompute)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model[0](torch.randn(5, 24)).sum()
    floats = [t for t in kept if t.shape == (32, 24) and t.is_floating_point() and t is not model[0].weight]
    assert (not floats) == (recompute is None)


def test_both_ways_have_the_same_gradients():
    models = [net() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, recompute in zip(models, (None, False), strict=True):
        torch.manual_seed(1)
        quantize_linears(model, partial(LRQAT, bits=4), recompute=recompute)
        for layer in quantized_layers(model).values():
            learned(layer.weight_quantizer)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.ones(5, 24)).sum().backward()
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert one.requires_grad == other.requires_grad
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_factors_have_a_group_of_their_own():
    model = net()
    quantize_linears(model, partial(LRQAT, bits=4), skip=["4"])
    groups = stableqat.parameter_groups(model, lr=1e-5, scale_lr_multiplier=1, factor_lr_multiplier=100)
    by_name = {g["name"]: g for g in groups}
    quantizer = model[0].weight_quantizer
    assert {id(p) for p in by_name["factors"]["params"]} >= {id(quantizer.factor_a), id(quantizer.factor_b)}
    assert len(by_name["factors"]["params"]) == 4
    assert by_name["factors"]["lr"] == pytest.approx(1e-3)
    assert by_name["factors"]["weight_decay"] == 0
    assert by_name["scales"]["lr"] == 1e-5
    assert [p is model[4].weight for p in by_name["weights"]["params"]] == [True]


def test_a_rank_is_a_positive_whole_number_and_at_most_full():
    weight = torch.randn(6, 32)
    for rank in (0, -1, 1.5, True):
        with pytest.raises(UserError, match="rank: must be a whole number from 1 on"):
            LRQAT(weight, bits=4, rank=rank)
    quantizer = LRQAT(weight, bits=4, rank=32)
    assert quantizer.describe()["rank"] == 6
    assert quantizer.describe()["alpha"] == 6.0
    assert LRQAT(weight, bits=4, rank=2, alpha=1).describe()["alpha"] == 1.0

"""The weight space moves the model's own weights and puts them back bit for bit."""

from functools import partial

import pytest
import torch
from torch import nn

import tiny
from stableqat.errors import UserError
from stableqat.landscape.space import WeightSpace, dot, norm
from stableqat.layers.hold import hold_weights
from stableqat.quantizers import STE
from stableqat.surgery import quantize_linears


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def model():
    return tiny.configured("llama").model.eval()


def test_it_holds_the_models_own_quantized_weights(model):
    space = WeightSpace(model)
    assert len(space) == 14  # seven layers in each of two blocks
    assert space.size == sum(weight.numel() for weight in space.weights.values())
    for name, weight in space.weights.items():
        assert weight is model.get_submodule(name).weight
    assert list(WeightSpace(model, [name]).weights) == [name]


def test_an_unknown_layer_is_named(model):
    with pytest.raises(UserError, match=r"^layers: no quantized layer is called model\.layers\.0\.mlp\.up"):
        WeightSpace(model, ["model.layers.0.mlp.up_pro"])


def test_frozen_weights_are_refused_in_a_line():
    with pytest.raises(UserError, match=r"^the weights of all quantized layers are frozen.* LRQAT does not$"):
        WeightSpace(tiny.configured("llama", "lrqat").model)
    assert not len(WeightSpace(tiny.configured("llama", "fp").model))


def test_a_move_adds_directions_of_any_type_to_a_start(model):
    space = WeightSpace(model)
    start, noise = space.get(), space.noise(3)
    half = [torch.ones_like(each, dtype=torch.bfloat16) for each in start]
    space.move(start, (0.5, noise), (-2.0, half))
    for weight, before, drawn in zip(space.weights.values(), start, noise, strict=True):
        torch.testing.assert_close(weight.detach(), before + 0.5 * drawn - 2)
        assert weight.dtype == before.dtype


def test_between_is_exact_at_both_ends(model):
    space = WeightSpace(model)
    start, end = space.get(), space.deployed()
    for share, expected in ((0.0, start), (1.0, end)):
        space.between(start, end, share)
        assert same(space.get(), expected)
    space.between(start, end, 0.25)
    for weight, a, b in zip(space.get(), start, end, strict=True):
        torch.testing.assert_close(weight, 0.75 * a + 0.25 * b)


@pytest.mark.parametrize("fails", [False, True])
def test_weights_return_bit_for_bit(model, fails):
    space, batch = WeightSpace(model), tiny.batch("llama", 2)["input_ids"]
    hold_weights(model)
    with torch.no_grad():
        before, start = model(batch).logits, space.get()
        try:
            with space.kept() as kept:
                assert same(kept, start)
                space.move(kept, (0.1, space.noise(0)))
                assert not torch.equal(model(batch).logits, before)  # a held value would show
                if fails:
                    raise RuntimeError("boom")
        except RuntimeError:
            assert fails
        assert same(space.get(), start)
        assert torch.equal(model(batch).logits, before)


def test_noise_is_that_of_its_seed(model):
    space = WeightSpace(model)
    noise = space.noise(7)
    assert same(noise, noise)
    assert not same(noise, space.noise(8))
    assert norm(noise).item() == pytest.approx(space.size**0.5, rel=0.05)
    assert dot(noise, noise).item() == pytest.approx(norm(noise).item() ** 2, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"group_size": 8}, {"per_channel": False}])
def test_steps_of_the_grid(options):
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    quantize_linears(model, partial(STE, bits=2, **options))
    space, quantizer = WeightSpace(model), model[0].weight_quantizer
    (weight,) = space.get()
    step = quantizer.scale.detach().repeat_interleave(16 // quantizer.scale.shape[1], 1).expand(4, 16)
    (one,) = space.in_steps([torch.ones(4, 16)])
    assert torch.equal(one, step)
    (there,) = space.per_step(space.in_steps([weight]))
    torch.testing.assert_close(there, weight)
    codes = weight / step
    assert ((codes[(codes > -2) & (codes < 1)] % 1) > 0).any()


def test_deployed_is_what_the_model_computes_with(model):
    space = WeightSpace(model)
    for name, value in zip(space.weights, space.deployed(), strict=True):
        layer = model.get_submodule(name)
        assert torch.equal(value, layer.weight_quantizer(layer.weight).detach())
    kept = list(space.quantized())
    point = space.deployed()
    with space.kept() as start:
        space.move(start, (1.0, space.noise(1)))
        assert same(space.dequantized(kept), point)
        assert not same(space.deployed(), point)


def test_a_frozen_weight_stays_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_linears(model, partial(STE, bits=2))
    model[1].weight.requires_grad_(False)
    assert list(WeightSpace(model).weights) == ["0"]


def test_experts_have_their_rows():
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads))
    quantize_linears(model, partial(STE, bits=2), skip=["lm_head"])
    space = WeightSpace(model)
    (name,) = [name for name in space.weights if name.endswith("gate_up_proj")]
    point = dict(zip(space.weights, space.deployed(), strict=True))
    assert point[name].shape == space.weights[name].shape == (3, 48, 16)
    assert all(len(row.unique()) <= 4 for row in point[name].flatten(0, 1))

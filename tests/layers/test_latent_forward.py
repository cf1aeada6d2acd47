"""Inside `full_precision` a quantized model computes what it did before surgery."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import stableqat
import tiny
from stableqat.layers.full_precision import full_precision
from stableqat.layers.hold import hold_weights
from test_api import MIXTURES


@pytest.mark.parametrize(
    "options", [{}, {"skip": []}, {"skip": [], "lean_loss": True}], ids=["untied", "tied", "tied, lean"]
)
@pytest.mark.parametrize("method", ["stableqat", "dsq"])
def test_a_quantized_model_computes_its_latent_weights(method, options):
    quantized, batch = tiny.configured("llama", method, **options), tiny.batch("llama")
    plain = tiny.configured("llama", "fp", **{k: v for k, v in options.items() if k != "skip"})
    before = quantized.loss(batch)
    for held in (False, True):
        if held:
            hold_weights(quantized)
        with full_precision(quantized):
            assert torch.equal(quantized.loss(batch), plain.loss(batch))
        assert torch.equal(quantized.loss(batch), before)
    assert not torch.equal(before, plain.loss(batch))


def test_a_part_may_be_asked_for_within_the_whole():
    quantized, batch = tiny.configured("llama"), tiny.batch("llama")
    rounded, block = quantized.loss(batch), quantized.model.model.layers[0]
    with full_precision(quantized):
        plain = quantized.loss(batch)
        with full_precision(block):
            assert torch.equal(quantized.loss(batch), plain)
        assert torch.equal(quantized.loss(batch), plain)
    assert torch.equal(quantized.loss(batch), rounded)
    assert not torch.equal(rounded, plain)


@pytest.mark.parametrize("kind", MIXTURES)
def test_so_do_experts_also_after_an_exception(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURES[kind]()).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    plain, ids = copy.deepcopy(model), torch.arange(24).reshape(2, 12)
    stableqat.prepare(model, "stableqat", bits=2)
    keys, before = model.state_dict().keys(), model(input_ids=ids).logits
    with full_precision(model):
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    with pytest.raises(KeyError), full_precision(model):
        model.state_dict()["lm_head.scale"]
    assert model.state_dict().keys() == keys
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.equal(before, plain(input_ids=ids).logits)

"""`quantizer: null` is the untouched model of transformers or timm, bit for bit."""

from functools import partial

import lightning as L
import pytest
import torch
from torch.nn import functional as F

import tiny

FAMILIES = ["llama", "vit"]


def untouched(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        from transformers import AutoConfig, AutoModelForCausalLM

        keys = {key: value for key, value in tiny.LLAMA.items() if key != "model_type"}
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **keys), dtype=torch.float32
        ).train()
    import timm

    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **tiny.VIT).train()


def loss_of(family: str, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if family == "llama":
        return model(**batch).loss
    return F.cross_entropy(model(batch["pixel_values"]), batch["labels"])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_added_and_nothing_is_replaced(family):
    ours, theirs = tiny.configured(family, "fp").model, untouched(family)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_as_a_plain_loop(family):
    steps = 5
    model = untouched(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    expected = []
    for batch in tiny.loader(family, count=4 * steps, batch_size=4):
        loss = loss_of(family, model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())

    L.seed_everything(0, verbose=False)
    module = tiny.module(family, "fp", optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0))
    torch.manual_seed(0)
    losses = tiny.Losses()
    data = tiny.loader(family, count=4 * steps, batch_size=4)
    tiny.trainer(max_steps=steps, gradient_clip_val=0.5, callbacks=[losses]).fit(module, data, data)
    assert losses.values == expected
    assert len(set(expected)) == steps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_model_adds_its_quantizers_only(family):
    plain, quantized = tiny.configured(family, "fp").model, tiny.configured(family, "dsq").model
    extra = quantized.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= quantized.state_dict().keys()
    assert extra
    assert all(".weight_quantizer." in key for key in extra)
    assert all(torch.equal(value, quantized.state_dict()[name]) for name, value in plain.state_dict().items())

"""The loss that `export` tells is the one that the run would measure, and the size what a run logs."""

from functools import partial

import pytest
import tiny_packed
import torch

import tiny
from stableqat.export.packed import evaluate
from stableqat.kinds import deployed_bytes
from stableqat.quantizers import DSQ, STE


def test_conversations_of_a_row_are_kept_apart_in_the_loss():
    module = tiny.configured("llama").eval()
    batch = tiny.batch("llama")
    logits, whole = evaluate(module, batch)
    batch["position_ids"] = torch.arange(16).remainder(6).expand(8, 16)
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, -100)
    apart, loss = evaluate(module, batch)
    assert loss == pytest.approx(module.loss(batch).item(), rel=1e-6)
    assert loss != pytest.approx(whole, rel=1e-4)
    assert torch.equal(apart, logits)  # files take whole rows


@pytest.mark.parametrize("family", ["llama", "qwen3", "vit"])  # llama ties its head
@pytest.mark.parametrize(
    "quantizer",
    [
        partial(STE, bits=3),
        partial(DSQ, bits=2, group_size=16),  # learns a sharpness, which no file holds
        tiny_packed.every_grid(),
    ],
)
def test_the_size_that_a_run_logs_is_that_of_what_is_packed(family, quantizer):
    packed, _ = tiny_packed.packed(family, None, quantizer=quantizer)
    codes = sum(each.codes.numel() * each.bits for each in packed.layers.values())
    scales = sum(each.scale.numel() for each in packed.layers.values())
    rest = sum(tensor.numel() for tensor in packed.rest().values())
    assert deployed_bytes(packed.model) == codes / 8 + 2 * (scales + rest)
    assert packed.module.describe()["deployed_mb"] == deployed_bytes(packed.model) / 1e6


def test_full_precision_takes_two_bytes_a_parameter():
    model = tiny.configured("llama", "fp").model
    assert deployed_bytes(model) == 2 * sum(p.numel() for p in model.parameters())

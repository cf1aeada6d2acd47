"""The loss that `export` tells is the one that the run would measure."""

import pytest
import torch

import tiny
from stableqat.export.packed import evaluate


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

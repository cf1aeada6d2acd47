"""No forward of a language model waits for values: the host learns nothing from the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny


class Read(TorchDispatchMode):
    """Counts how often the host reads a value."""

    times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lean_loss", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_forward_reads_no_value(model_type, packed, lean_loss):
    heads = tiny.LLAMA["num_attention_heads"]
    config = {**tiny.LLAMA, "model_type": model_type, "num_key_value_heads": heads}
    module = tiny.configured("llama", "stableqat", config=config, lean_loss=lean_loss)
    batch = module.example_batch(2, tokens=8)
    if packed:
        batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], list(range(8))])
    module.loss(batch)
    with Read() as read:
        module.loss(batch).backward()
    assert read.times == 0


def test_a_captured_forward_has_the_mask_of_any_other(monkeypatch):
    """While a CUDA graph is captured, transformers would make a whole mask."""
    module, masks = tiny.configured("llama", "stableqat"), []
    layer = next(iter(module.blocks(module.model)))
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    module.loss(module.example_batch(2, tokens=8))
    assert masks == [None]


def test_rows_of_one_document_with_positions_are_those_without():
    module = tiny.configured("llama", "stableqat")
    batch = module.example_batch(2, tokens=8)
    positions = torch.arange(8).repeat(2, 1)
    found, expected = module(batch["input_ids"], positions), module(batch["input_ids"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

"""What both families promise: a loss without a trainer, batches to try it on, a model that trains."""

import copy

import pytest
import torch

import tiny

SHAPES = {"llama": (3, 5), "vit": (3, 1, 8, 8)}


@pytest.mark.parametrize("family", SHAPES)
def test_the_loss_of_an_example_batch_needs_no_trainer(family):
    made = tiny.configured(family, "ste")
    batch = made.example_batch(3, tokens=5, seed=1)
    assert batch[made.input_key].shape == SHAPES[family]
    assert made.family == {"llama": "text", "vit": "images"}[family]
    made.loss(batch).backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    again, other = (made.example_batch(3, tokens=5, seed=seed)[made.input_key] for seed in (1, 2))
    assert torch.equal(batch[made.input_key], again)
    assert not torch.equal(again, other)


def test_examples_of_text_end_with_the_positions():
    made = tiny.module("llama")
    assert made.example_batch(2, tokens=1000)["input_ids"].shape == (2, 16)


@pytest.mark.parametrize("options", [{}, {"lean_loss": True, "activation_checkpointing": True, "skip": []}])
def test_assembled_is_what_configure_model_makes(options):
    """On the Parameters of the plain model: in full precision, quantized, and as the module itself trains."""
    module = tiny.module("llama", "ste", **options)
    torch.manual_seed(0)
    plain = module.build_model()
    values, full = copy.deepcopy(plain.state_dict()), copy.deepcopy(plain)
    report = module.assemble(plain, module.quantizer)
    expected = tiny.configured("llama", "ste", **options)
    assert report.swapped == expected.surgery.swapped
    assert module.assemble(full, None) is None
    assert full.state_dict().keys() == values.keys()
    batch, losses = module.example_batch(2), []
    for model in (plain, full):
        module.model = model
        losses.append(module.loss(batch).item())
    assert losses[0] == expected.loss(batch).item()
    assert losses[1] == pytest.approx(tiny.configured("llama", "fp").loss(batch).item(), rel=1e-6)
    assert losses[0] != losses[1]

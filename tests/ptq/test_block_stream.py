"""What flows block by block is what flows through the whole model."""

import pytest
import torch

import tiny
from stableqat.layers.full_precision import full_precision
from stableqat.layers.linear import quantized_layers
from stableqat.ptq.stream import Stream

CPU = torch.device("cpu")


def batches(family):
    return [{key: value[at : at + 2] for key, value in tiny.batch(family).items()} for at in (0, 2, 4)]


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_the_loss_is_the_models(family):
    module = tiny.configured(family).eval()
    stream, seen = Stream(module, batches(family), CPU), []
    for block in stream.blocks():
        seen += block.layers
        list(stream.inputs(block))  # which changes nothing
    assert seen == list(quantized_layers(module.model))
    with torch.no_grad():
        expected = [module.loss(batch).item() for batch in batches(family)]
    assert list(stream.losses()) == pytest.approx(expected, rel=1e-6)
    assert [module.loss(batch).item() for batch in batches(family)] == expected  # the model is as it was


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_a_forward_pass_begins_at_any_block(family):
    """With the loss of the whole model, also of another block's weights; blocks before it do not run."""
    module = tiny.configured(family).eval()
    stream = Stream(module, batches(family), CPU)
    with torch.no_grad():
        expected = [module.loss(batch).item() for batch in batches(family)]
        for number in range(3):
            if number:
                stream.flow(number - 1)
            for index, batch in enumerate(batches(family)):
                with stream.resumed(number, index):
                    assert module.loss(batch).item() == pytest.approx(expected[index], rel=1e-6)
        stream = Stream(module, batches(family), CPU)
        stream.flow(0)
        first, second = module.blocks(module.model)
        for parameter in first.parameters():
            parameter.zero_()
        with stream.resumed(1, 0):
            assert module.loss(batches(family)[0]).item() == pytest.approx(expected[0], rel=1e-6)
        for parameter in second.parameters():
            parameter.mul_(2)
        with stream.resumed(1, 0):
            assert module.loss(batches(family)[0]).item() != pytest.approx(expected[0], rel=1e-4)


def test_documents_that_do_not_see_each_other():
    module = tiny.configured("llama").eval()
    batch = {**tiny.batch("llama", 2), "position_ids": torch.arange(16).remainder(7).expand(2, -1)}
    stream = Stream(module, [batch], CPU)
    list(stream.blocks())
    assert list(stream.losses()) == pytest.approx([module.loss(batch).item()], rel=1e-6)
    del batch["position_ids"]
    assert list(stream.losses()) != pytest.approx([module.loss(batch).item()], rel=1e-5)


def test_each_layer_sees_its_inputs_in_full_precision():
    """The second block sees what the first, rounded, makes of the data; within it nothing is rounded."""
    module = tiny.configured("llama").eval()
    _, second = module.model.model.layers
    stream = Stream(module, batches("llama"), CPU)
    blocks = stream.blocks()
    next(blocks)
    block = next(blocks)
    seen, found = {}, {}
    for activations in stream.inputs(block):
        for x, names in activations.items():
            for name in names:
                seen.setdefault(name, []).append(x)
    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: found.setdefault(name, []).append(args[0]))
        for name, layer in block.layers.items()
    ]
    for batch in batches("llama"):
        with full_precision(second), torch.no_grad():
            module.loss(batch)
    for handle in handles:
        handle.remove()
    assert seen.keys() == found.keys() == block.layers.keys()
    for name, values in seen.items():
        assert torch.allclose(torch.cat(values), torch.cat(found[name]), atol=1e-5), name

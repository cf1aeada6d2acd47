"""Compiled blocks train as plain ones do, and evaluate as what they are."""

import copy
import logging

import pytest
import torch
from torch import nn

import tiny
from stableqat.errors import UserError
from stableqat.modules.compiled import CompiledForward, compile_blocks


class Block(nn.Linear):
    """A small block."""

    def forward(self, x):
        return super().forward(x).sin()


class Opaque(nn.Linear):
    """A block that the compiler gives up on."""

    def forward(self, x):
        if torch.compiler.is_compiling():
            raise torch._dynamo.exc.InternalTorchDynamoError("no way to trace this")
        return super().forward(x)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_every_block_is_compiled_and_keeps_its_names(family):
    compiled, eager = (tiny.configured(family, "dsq", compile_model=flag) for flag in (True, False))
    for module, expected in ((compiled, True), (eager, False)):
        blocks = list(module.blocks(module.model))
        assert blocks
        assert all(isinstance(vars(b).get("forward"), CompiledForward) is expected for b in blocks)
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def test_a_model_on_a_cpu_is_not_compiled_unless_asked():
    module = tiny.module("llama")
    tiny.trainer(max_steps=1).fit(module, tiny.loader("llama"), tiny.loader("llama"))
    assert not any("forward" in vars(block) for block in module.blocks(module.model))


def test_evaluation_is_plain():
    block = Block(4, 4)
    compile_blocks([block], required=True)
    block.forward.compiled = None  # to call it would fail
    x = torch.randn(2, 4)
    with torch.no_grad():
        block(x)
    block.eval()(x)
    with pytest.raises(TypeError):
        block.train()(x)


def test_a_copy_computes_with_its_own_weights():
    block = Block(4, 4)
    compile_blocks([block], required=True)
    other = copy.deepcopy(block)
    nn.init.zeros_(other.weight), nn.init.zeros_(other.bias)
    assert other.forward.module is other
    assert not other.eval()(torch.randn(2, 4)).any()


def test_a_block_that_cannot_be_compiled_stays_plain_or_is_refused(caplog):
    x = torch.randn(2, 4)
    block = Opaque(4, 4)
    compile_blocks([block], required=False)
    with caplog.at_level(logging.WARNING):
        expected = nn.Linear.forward(block, x)
        assert torch.equal(block(x), expected)
        assert torch.equal(block(x), expected)
    assert [r.getMessage().split(":")[0].split(" (")[0] for r in caplog.records] == [
        "Opaque cannot be compiled"
    ]
    block = Opaque(4, 4)
    compile_blocks([block], required=True)
    with pytest.raises(UserError, match=r"model.compile_model: Opaque cannot be compiled .*; remove it"):
        block(x)


@pytest.mark.slow
def test_a_compiled_model_trains_as_an_eager_one():
    traces = []
    for flag in (True, False):
        losses = tiny.Losses()
        torch.manual_seed(0)
        trainer = tiny.trainer(max_steps=3, callbacks=[losses])
        trainer.fit(
            tiny.module("llama", "stableqat", compile_model=flag), tiny.loader("llama"), tiny.loader("llama")
        )
        traces.append(losses.values)
    assert traces[0] == pytest.approx(traces[1], rel=1e-5)

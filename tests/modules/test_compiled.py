"""Compiled blocks train as plain ones do, and evaluate as what they are."""

import copy
from functools import partial

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


def fails(*_):
    raise RuntimeError("compiled")


def test_evaluation_is_plain():
    block = Block(4, 4)
    compile_blocks([block], required=True)
    block.forward.compiled = fails
    x = torch.randn(2, 4)
    with torch.no_grad():
        block(x)
    block.eval()(x)
    with pytest.raises(RuntimeError, match="compiled"):
        block.train()(x)


def test_a_copy_computes_with_its_own_weights():
    block = Block(4, 4)
    compile_blocks([block], required=True)
    other = copy.deepcopy(block)
    nn.init.zeros_(other.weight), nn.init.zeros_(other.bias)
    assert other.forward.module is other
    assert not other.eval()(torch.randn(2, 4)).any()


def test_a_block_that_cannot_be_compiled_stays_plain_or_is_refused(caplog):
    def compiled(forward, x):
        raise torch._dynamo.exc.InternalTorchDynamoError("no way to trace this")

    x = torch.randn(2, 4)
    for required in (False, True):
        block = Block(4, 4)
        compile_blocks([block], required=required)
        block.forward.compiled = compiled
        if required:
            with pytest.raises(
                UserError, match=r"compile_model: Block cannot be compiled \(no way .*; remove"
            ):
                block(x)
        else:
            assert torch.equal(block(x), Block.forward(block, x))
            assert torch.equal(block(x), Block.forward(block, x))
    assert [record.getMessage() for record in caplog.records] == [
        "Block cannot be compiled (no way to trace this): it trains as it is"
    ]


def test_one_compilation_serves_all_blocks_of_a_model_and_no_other(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for number in (1, 2):
        torch._dynamo.utils.counters.clear()
        config = {**tiny.LLAMA, "num_hidden_layers": 3}
        module = tiny.configured("llama", "stableqat", config=config, compile_model=True).train()
        module.loss(module.example_batch(2, tokens=8)).backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, number


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

"""Masters, scales and rotary tables stay in float32; compiling leaves no trace in what is saved."""

import pytest
import torch

import tiny
from stableqat.errors import UserError
from stableqat.layers.linear import QuantLinear


class Types(tiny.Losses):
    """What a quantizer is given and what its layer computes."""

    def on_train_start(self, trainer, pl_module):
        self.seen = set()
        layer = next(m for m in pl_module.modules() if isinstance(m, QuantLinear))

        def see(layer, inputs, output):
            self.seen |= {("weight", layer.weight.dtype), ("output", output.dtype)}

        layer.register_forward_hook(see)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_mixed_precision_computes_in_bfloat16_over_float32_masters(family):
    module, types = tiny.module(family, "dsq"), Types()
    trainer = tiny.trainer(max_steps=2, precision="bf16-mixed", callbacks=[types])
    trainer.fit(module, tiny.loader(family), tiny.loader(family))
    assert types.seen == {("weight", torch.float32), ("output", torch.bfloat16)}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    moments = trainer.optimizers[0].state.values()
    assert {moment["exp_avg"].dtype for moment in moments} == {torch.float32}


def test_rotary_tables_keep_their_precision():
    """Cast to bfloat16 they move the logits by 1e-3 and more."""
    module = tiny.module("llama")
    trainer = tiny.trainer(max_steps=1, precision="bf16-mixed")
    trainer.fit(module, tiny.loader("llama"), tiny.loader("llama"))
    [table] = {
        b.data_ptr(): b for n, b in module.named_buffers() if n.endswith("rotary_emb.inv_freq")
    }.values()
    assert table.dtype == torch.float32
    assert table.tolist() == pytest.approx([10000 ** (-i / 16) for i in range(0, 16, 2)], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_masters_are_refused(precision):
    trainer = tiny.trainer(max_steps=1, precision=precision)
    mixed = precision.replace("true", "mixed")
    with pytest.raises(UserError, match=f"trainer.precision: {precision} .*take {mixed}"):
        trainer.fit(tiny.module("llama"), tiny.loader("llama"), tiny.loader("llama"))

"""Checkpointed blocks give the very same training, with a part of the memory."""

from copy import deepcopy
from functools import partial

import lightning as L
import pytest
import torch

import tiny
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import DSQ, StableQAT


def module(checkpointing, method="dsq", family="llama", **options):
    """With dropout, so that the recomputation has randomness to repeat."""
    architecture = {
        "llama": {"config": {**tiny.LLAMA, "attention_dropout": 0.3, "num_hidden_layers": 4}},
        "vit": {"model_args": {**tiny.VIT, "proj_drop_rate": 0.3, "drop_path_rate": 0.2, "depth": 4}},
    }
    options = {**architecture[family], "activation_checkpointing": checkpointing, **options}
    return tiny.module(family, method, **options)


def fit(
    checkpointing,
    *,
    family="llama",
    steps=4,
    callbacks=(),
    compiled=False,
    precision="32-true",
    windows=1,
    **options,
):
    L.seed_everything(0, verbose=False)
    made, losses = module(checkpointing, family=family, **options), tiny.Losses()
    trainer = tiny.trainer(
        max_steps=steps, callbacks=[losses, *callbacks], precision=precision, accumulate_grad_batches=windows
    )
    if compiled:
        made.configure_model()
        made.model.compile(backend="eager")
    data = tiny.loader(family, 16, 4)
    trainer.fit(made, data, data)
    return losses.values, {name: value.clone() for name, value in made.state_dict().items()}


def same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fp"},
        {"method": "dsq"},
        {"method": "fp", "family": "vit"},
        {"method": "dsq", "family": "vit"},
        {"method": "stableqat", "precision": "bf16-mixed"},
        {"method": "paretoq", "windows": 2},
        {"method": "ste", "lean_loss": True, "skip": []},
        {"method": "ste", "recompute": False},
    ],
    ids=str,
)
def test_losses_and_weights_are_bit_equal(options):
    expected = fit(False, **options)
    assert len(set(expected[0])) == len(expected[0])
    same(fit(True, **options), expected)


def saved_bytes(checkpointing, family, **options):
    """Bytes of activations that a forward keeps for the backward: parameters are there anyway."""
    L.seed_everything(0, verbose=False)
    made = module(checkpointing, family=family, **options)
    made.configure_model()
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = made.loss(tiny.batch(family))
    loss.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    return sum(seen.values())


@pytest.mark.parametrize(("family", "method"), [("llama", "fp"), ("llama", "dsq"), ("vit", "dsq")])
def test_it_keeps_a_fraction_of_the_activations(family, method):
    assert saved_bytes(True, family, method=method) < 0.4 * saved_bytes(False, family, method=method)


def test_each_layer_is_computed_twice_and_not_in_evaluation():
    made = module(True, "fp")
    made.configure_model()
    calls = []
    for layer in made.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    made.loss(tiny.batch("llama")).backward()
    assert len(calls) == 8
    calls.clear()
    with torch.no_grad():
        made.eval().predict_step(tiny.batch("llama"), 0)
    assert len(calls) == 4


@pytest.mark.parametrize("quantizer", [partial(StableQAT, bits=2), partial(DSQ, bits=2)])
def test_layers_that_kernels_would_take_together(quantizer, monkeypatch):
    """A value prepared by the block's hook lies outside its checkpoint, and is not computed at all."""
    monkeypatch.setattr("stableqat.layers.linear.QuantLinear.implementation", "triton")
    prepared = []
    original = quantizer.func.many
    monkeypatch.setattr(
        quantizer.func, "many", lambda self, *args: prepared.append(1) or original(self, *args)
    )
    expected = fit(False, quantizer=quantizer, steps=2)
    assert prepared
    prepared.clear()
    found = fit(True, quantizer=quantizer, steps=2)
    assert not prepared
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


def test_a_copy_of_the_model_checkpoints_its_own_layers():
    """Averaged weights are kept in a copy."""
    made = module(True, "fp")
    made.configure_model()
    copied = deepcopy(made.model)
    copied.train()
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.zero_()
    ids = tiny.batch("llama")["input_ids"]
    copied(input_ids=ids, labels=ids).loss.backward()
    assert copied.model.layers[0].mlp.up_proj.weight.grad.any()


def test_it_trains_compiled():
    assert fit(True, compiled=True, steps=2)[0] == pytest.approx(fit(False, steps=2)[0], rel=1e-3)


def test_a_checkpoint_loads_as_it_was_trained(tmp_path):
    made = module(True)
    trainer = tiny.trainer(max_steps=1)
    data = tiny.loader("llama", 8, 4)
    trainer.fit(made, data, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = type(made).load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.activation_checkpointing
    assert quantized_layers(loaded.model).keys() == quantized_layers(made.model).keys()

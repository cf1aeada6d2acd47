"""Accumulated gradients and evaluation fake-quantize once what does not change, and change no result."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

import tiny
from stableqat.callbacks.hold import HoldWeights
from stableqat.callbacks.refused import check_trainer
from stableqat.errors import UserError
from stableqat.layers.linear import quantized_layers
from stableqat.modules.parallel import FSDP2Strategy

LAYERS = {"llama": 14, "vit": 8}
FAMILIES = pytest.mark.parametrize("family", LAYERS)


def holds(module):
    return any(layer._held is not None for layer in quantized_layers(module).values())


def fit(family, steps=2, *, windows=4, method="dsq", callbacks=(), **options):
    """Losses and final state; 16 batches an epoch."""
    L.seed_everything(0, verbose=False)
    module, losses = tiny.module(family, method), tiny.Losses()
    trainer = tiny.trainer(
        max_steps=steps, accumulate_grad_batches=windows, callbacks=[losses, *callbacks], **options
    )
    trainer.fit(module, tiny.loader(family, 64, 4), tiny.loader(family, 12, 4))
    assert not holds(module)
    return losses.values, {name: value.clone() for name, value in module.state_dict().items()}, trainer


def same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())


@pytest.fixture
def unheld(monkeypatch):
    """`fit` without held weights."""

    def run(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(HoldWeights, "_hold", lambda *_: None)
            return fit(*args, **options)

    return run


@pytest.mark.parametrize(("family", "precision"), [("llama", "bf16-mixed"), ("vit", "32-true")])
def test_an_accumulated_gradient_is_of_weights_computed_once(family, precision, computed, unheld):
    found = fit(family, precision=precision)
    assert len(computed) == 2 * LAYERS[family]  # windows
    computed.clear()
    expected = unheld(family, precision=precision)
    assert len(computed) == 8 * LAYERS[family]  # micro-steps
    same(found, expected)
    assert len(set(found[0])) == 8


def test_a_window_cut_short_by_the_end_of_an_epoch(computed, unheld):
    found = fit("vit", 4, windows=5, limit_train_batches=7)  # windows of 5, 2, 5, 2 batches
    assert len(found[0]) == 14
    assert len(computed) == 4 * LAYERS["vit"]
    same(found, unheld("vit", 4, windows=5, limit_train_batches=7))


class Holding(L.Callback):
    """Whether weights are held in each backward."""

    def __init__(self):
        self.seen = []

    def on_after_backward(self, trainer, pl_module):
        self.seen.append(holds(pl_module))


@pytest.mark.parametrize("windows", [1, 2])
def test_without_accumulation_no_memory_is_spent(windows, computed):
    holding = Holding()
    fit("vit", 3, windows=windows, callbacks=[holding])
    assert holding.seen == [windows > 1] * 3 * windows
    assert len(computed) == 3 * LAYERS["vit"]


def test_clipped_gradients_and_another_optimizer(unheld, monkeypatch):
    monkeypatch.setattr(
        tiny, "module", partial(tiny.module, optimizer=partial(torch.optim.AdamW, fused=True))
    )
    same(fit("vit", gradient_clip_val=0.5), unheld("vit", gradient_clip_val=0.5))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@FAMILIES
def test_evaluation_computes_a_weight_once(family, stage, computed):
    module = tiny.configured(family, "dsq")
    trainer = tiny.trainer(limit_val_batches=None)
    run = getattr(trainer, stage)
    data = tiny.loader(family, 12, 4)
    quiet = {} if stage == "predict" else {"verbose": False}
    computed.clear()
    run(module, data, **quiet)
    assert len(computed) == LAYERS[family]
    assert not holds(module)


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_evaluation_gives_what_it_gave(stage, monkeypatch):
    module, data = tiny.configured("llama", "dsq"), tiny.loader("llama", 12, 4)

    def run():
        trainer = tiny.trainer(limit_val_batches=None)
        if stage == "predict":
            return torch.cat(trainer.predict(module, data))
        trainer.validate(module, data, verbose=False)
        return trainer.callback_metrics["val/loss"]

    found = run()
    monkeypatch.setattr(HoldWeights, "_hold", lambda *_: None)
    assert torch.equal(found, run())


def test_a_validation_in_the_middle_of_a_window_changes_nothing(computed, unheld):
    plain = fit("llama", precision="bf16-mixed")
    computed.clear()
    options = {"precision": "bf16-mixed", "val_check_interval": 3, "limit_val_batches": 3}
    found = fit("llama", **options)
    # after batches 3 and 6, in the middle of a window each: at most once before, during and after it
    assert 4 * LAYERS["llama"] <= len(computed) <= 6 * LAYERS["llama"]
    same(found, plain)
    expected = unheld("llama", **options)
    assert found[2].callback_metrics["val/loss"] == expected[2].callback_metrics["val/loss"]
    same(found, expected)


def test_validation_after_a_step_sees_the_new_weights(unheld):
    options = {"val_check_interval": 4, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    found, expected = fit("vit", **options), unheld("vit", **options)
    assert found[2].callback_metrics["val/loss"] == expected[2].callback_metrics["val/loss"]
    same(found, expected)


class Stop(L.Callback):
    """Ends training in the middle of a window."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.fit_loop.total_batch_idx >= 5


def test_nothing_is_held_after_a_stop_in_the_middle_of_a_window():
    assert len(fit("vit", 4, callbacks=[Stop()])[0]) == 6


class Broken(L.Callback):
    def on_validation_batch_end(self, *_):
        raise ArithmeticError


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_an_exception_in_validation_does_not_stop_later_training():
    module, data = tiny.module("vit", "dsq"), tiny.loader("vit", 8, 4)
    trainer = tiny.trainer(max_steps=2, limit_val_batches=1, val_check_interval=1, callbacks=[Broken()])
    with pytest.raises(ArithmeticError):
        trainer.fit(module, data, data)
    tiny.trainer(max_steps=1).fit(module, data, data)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_are_what_is_validated(unheld):
    """Lightning swaps them in when validation has begun."""

    def run(fit):
        return fit(
            "vit", 2, val_check_interval=4, limit_val_batches=1, callbacks=[EMAWeightAveraging(decay=0.5)]
        )

    found, expected = run(fit), run(unheld)
    assert found[2].callback_metrics["val/loss"] == expected[2].callback_metrics["val/loss"]
    same(found, expected)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@FAMILIES
def test_the_average_is_that_of_all_steps(family):
    class Steps(L.Callback):
        seen = []

        def on_train_batch_end(self, trainer, module, *_):
            self.seen.append([parameter.detach().clone() for parameter in module.parameters()])

    steps, module = Steps(), tiny.module(family, "dsq")
    trainer = tiny.trainer(max_steps=4, callbacks=[steps, WeightAveraging()])
    trainer.fit(module, tiny.loader(family, 32))
    names = [name for name, _ in module.named_parameters()]
    assert any("weight_quantizer.scale" in name for name in names)
    for name, ended, *taken in zip(names, module.parameters(), *steps.seen, strict=True):
        torch.testing.assert_close(ended.detach(), torch.stack(taken).mean(0), msg=name)


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (StochasticWeightAveraging(1e-2), "StochasticWeightAveraging copies .*; take WeightAveraging or EMA"),
        (ModelPruning("l1_unstructured", amount=0.5), "ModelPruning picks weights before .*init_from"),
    ],
)
@FAMILIES
def test_a_callback_that_would_find_no_weights_is_refused(family, callback, line):
    module, data = tiny.module(family), tiny.loader(family)
    with pytest.raises(UserError, match=rf"^trainer\.callbacks: {line}"):
        tiny.trainer(callbacks=[callback], max_epochs=2, max_steps=-1).fit(module, data, data)
    assert module.model is None


@pytest.mark.parametrize("callback", [WeightAveraging, EMAWeightAveraging])
def test_sharded_weights_are_not_averaged(callback):
    trainer = SimpleNamespace(callbacks=[callback()], strategy=FSDP2Strategy(), precision_plugin=None)
    with pytest.raises(
        UserError, match=rf"^trainer\.callbacks: {callback.__name__} cannot average sharded weights"
    ):
        check_trainer(trainer)

"""What a start loses in full precision and rounded, measured before training and without effect on it."""

import random
from math import isnan, log
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import tiny
from stableqat.callbacks import Baseline, RunRecord
from stableqat.errors import UserError
from stableqat.events import read_run

TAGS = ("hp/loss_fp", "hp/loss_ptq")


class Generators(L.Callback):
    """Draws from every generator before the first step, where no one seeds it."""

    drawn: tuple = ()

    def on_train_epoch_start(self, trainer, pl_module):
        self.drawn = (random.random(), np.random.rand(), torch.rand(1).item())


def train(family, method, baseline, folder=None, validation=2, ckpt_path=None, **options):
    losses, generators = tiny.Losses(), Generators()
    logger = folder and TensorBoardLogger(folder, name="", version="run", default_hp_metric=False)
    module = tiny.module(family, method, **options.pop("module", {}))
    L.seed_everything(3, verbose=False)
    callbacks = [losses, generators, *([RunRecord()] if folder else []), *filter(None, [baseline])]
    trainer = tiny.trainer(
        **{"max_steps": 3, "limit_val_batches": validation, "val_check_interval": 3} | options,
        callbacks=callbacks,
        logger=logger or False,
        log_every_n_steps=1,
    )
    trainer.fit(module, tiny.loader(family, 24), tiny.loader(family, 24), ckpt_path=ckpt_path)
    modes = {name: part.training for name, part in module.named_modules()}
    return losses.values, generators.drawn, modes, module.state_dict(), trainer


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "ste", {}),
        ("llama", "dsq", {"module": {"skip": [], "lean_loss": True}}),
        ("llama", "stableqat", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
        ("vit", "paretoq", {}),
    ],
)
def test_both_losses_are_those_of_a_validation_and_training_does_not_notice(family, method, options):
    baseline = Baseline()
    found = train(family, method, baseline, **options)
    expected = train(family, method, None, **options)
    assert found[:3] == expected[:3]
    assert all(torch.equal(found[3][name], tensor) for name, tensor in expected[3].items())
    for name, loss in (("fp", baseline.loss_fp), (method, baseline.loss_ptq)):
        L.seed_everything(3, verbose=False)
        chosen = {k: v for k, v in options.get("module", {}).items() if name != "fp" or k != "skip"}
        module = tiny.module(family, name, **chosen)
        trainer = tiny.trainer(limit_val_batches=2, precision=options.get("precision"))
        [metrics] = trainer.validate(module, tiny.loader(family, 24), verbose=False)
        assert loss == metrics["val/loss"]
    assert baseline.loss_fp != baseline.loss_ptq
    assert baseline.in_words(2.5).endswith(f"{baseline.loss_ptq:.4g} rounded, 2.5 now")


def test_the_record_has_both_losses_from_the_first_step_and_a_resumed_run_keeps_them(tmp_path):
    *_, trainer = train("llama", "ste", first := Baseline(), tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    run = read_run(tmp_path / "run", ("hp/", "val/"))
    assert [run.scalars[tag][0] for tag in TAGS] == pytest.approx([first.loss_fp, first.loss_ptq])
    assert [run.last(tag) for tag in TAGS] == pytest.approx([first.loss_fp, first.loss_ptq])
    assert list(run.scalars["val/loss"]) == [2]  # none at the start
    resumed = Baseline()
    train("llama", "ste", resumed, ckpt_path=tmp_path / "last.ckpt", max_steps=4)
    assert resumed.losses == first.losses


def test_a_run_in_full_precision_has_the_first_loss_alone():
    train("vit", "fp", baseline := Baseline())
    assert baseline.loss_fp > 0
    assert isnan(baseline.loss_ptq)
    assert baseline.in_words() == f"validation loss: {baseline.loss_fp:.4g} full precision"


@pytest.mark.parametrize(
    ("baseline", "options"),
    [
        (Baseline(enabled=False), {}),
        (Baseline(), {"validation": 0}),
        (Baseline(), {"fast_dev_run": 1}),
    ],
    ids=["switched off", "no validation", "fast_dev_run"],
)
def test_nothing_is_measured(baseline, options):
    train("llama", "ste", baseline, **options)
    assert all(map(isnan, baseline.losses.values()))
    assert baseline.in_words() == ""
    assert baseline.in_words(1.0) == "validation loss: 1 now"


@pytest.fixture
def start(tmp_path) -> Path:
    """A run of a model whose head is turned round, which is worse than a guess."""
    *_, trainer = train("llama", "fp", None)
    trainer.lightning_module.model.model.norm.weight.data.mul_(-20)
    trainer.save_checkpoint(tmp_path / "start.ckpt")
    return tmp_path / "start.ckpt"


def test_a_start_no_better_than_chance_is_refused_unless_it_is_to_be_trained(start):
    told = rf"start.ckpt predicts no better than chance: .* that of a guess {log(64):.4g}; .* tokenizer"
    with pytest.raises(UserError, match=told):
        train("llama", "ste", Baseline(), module={"init_from": str(start)})
    train("llama", "ste", Baseline(stop_at_chance=False), module={"init_from": str(start)})
    train("llama", "ste", Baseline(), module={})  # random weights


def test_a_new_classifier_may_guess(tmp_path):
    *_, trainer = train("vit", "fp", None)
    trainer.save_checkpoint(tmp_path / "start.ckpt")
    for classes, new in ((10, False), (11, True)):
        module = tiny.module("vit", "ste", init_from=str(tmp_path / "start.ckpt"), num_classes=classes)
        module.configure_model()
        assert module.chance() == (None if new else pytest.approx(log(10), rel=0.02))

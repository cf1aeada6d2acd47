"""The average of the weights is what is validated, saved and evaluated; the weights themselves train on."""

import pytest
import torch

import tiny
from stableqat.callbacks import EMA, BestCheckpoint, HoldWeights, LastCheckpoint
from stableqat.callbacks.refused import check_trainer
from stableqat.errors import UserError
from stableqat.modules import FSDP2Strategy, ViTModule


class Trace(tiny.Losses):
    """The weights after each step, and what each validation found."""

    def __init__(self):
        super().__init__()
        self.weights, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, *rest):
        super().on_train_batch_end(trainer, pl_module, outputs, *rest)
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.callback_metrics["val/loss"].item())


# epochs of one batch, so that a resumed run sees the same ones
def fit(tmp_path, decay, steps=4, method="dsq", **options):
    trace, made = Trace(), tiny.module("vit", method)
    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    callbacks = [trace, EMA(decay), BestCheckpoint(), LastCheckpoint()]
    trainer = tiny.trainer(
        max_steps=steps, callbacks=callbacks, check_val_every_n_epoch=2, limit_val_batches=1, **saving
    )
    data = tiny.loader("vit")
    torch.manual_seed(3)
    trainer.fit(made, data, tiny.loader("vit"), weights_only=True, **options)
    return made, trace, trainer


def by_hand(trace, decay):
    average = dict(trace.weights[0])
    for step, weights in enumerate(trace.weights[1:], 1):
        kept = min(decay, (1 + step) / (10 + step))
        average = {name: kept * average[name] + (1 - kept) * weights[name] for name in weights}
    return average


def loss_of(path):
    loaded = ViTModule.load_from_checkpoint(path)
    found = tiny.trainer(limit_val_batches=1).validate(loaded, tiny.loader("vit"), verbose=False)
    return found[0]["val/loss"]


@pytest.mark.parametrize("decay", [0.1, 0.999])
def test_it_is_what_is_validated_saved_and_left_in_the_module(tmp_path, decay):
    made, trace, trainer = fit(tmp_path, decay)
    expected = by_hand(trace, decay)
    last = torch.load(trainer.checkpoint_callbacks[1].best_model_path, weights_only=True)
    for name, value in expected.items():
        assert torch.allclose(last["state_dict"][name], value, rtol=1e-5, atol=1e-8), name
        assert torch.equal(last["current_model_state"][name], trace.weights[-1][name]), name
        assert torch.equal(made.state_dict()[name], last["state_dict"][name]), name
        if name.endswith("scale_floor"):
            assert torch.equal(last["state_dict"][name], trace.weights[0][name]), name
    assert not torch.allclose(made.model.head.weight, trace.weights[-1]["model.head.weight"], atol=1e-6)
    best = trainer.checkpoint_callbacks[0].best_model_path
    assert loss_of(best) == pytest.approx(min(trace.validated), abs=1e-6)
    assert loss_of(trainer.checkpoint_callbacks[1].best_model_path) == pytest.approx(trace.validated[-1])


def test_training_is_that_without_an_average(tmp_path):
    with_one, without = fit(tmp_path / "a", 0.9)[1], fit(tmp_path / "b", None)[1]
    assert with_one.values == without.values
    assert with_one.validated != without.validated
    assert all(torch.equal(with_one.weights[-1][name], value) for name, value in without.weights[-1].items())


def test_without_a_decay_nothing_is_kept(tmp_path):
    _, _, trainer = fit(tmp_path, None)
    saved = torch.load(trainer.checkpoint_callbacks[1].best_model_path, weights_only=True)
    assert "current_model_state" not in saved
    assert not [key for key in saved["callbacks"] if "EMA" in key]


def test_a_resumed_run_goes_on_with_both(tmp_path):
    whole, all_steps, _ = fit(tmp_path / "whole", 0.9, 6)
    _, _, half = fit(tmp_path / "half", 0.9, 4)
    resumed, rest, _ = fit(tmp_path / "half", 0.9, 6, ckpt_path=half.checkpoint_callbacks[1].best_model_path)
    assert rest.values == all_steps.values[4:]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_an_interrupted_validation_saves_the_weights_as_weights(tmp_path):
    class Stop(HoldWeights):
        def on_validation_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                raise RuntimeError("stop")

    made, trace = tiny.module("vit"), Trace()
    last = LastCheckpoint()
    trainer = tiny.trainer(
        max_steps=6,
        callbacks=[trace, EMA(0.9), Stop(), last],
        check_val_every_n_epoch=2,
        limit_val_batches=1,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(made, tiny.loader("vit"), tiny.loader("vit"))
    saved = torch.load(last._last_checkpoint_saved, weights_only=True)
    key = "model.head.weight"
    assert saved["global_step"] == 4
    assert torch.equal(saved["current_model_state"][key], trace.weights[3][key])
    assert torch.allclose(saved["state_dict"][key], by_hand(trace, 0.9)[key], rtol=1e-5, atol=1e-8)


def test_sharded_weights_are_averaged_by_nobody():
    trainer = tiny.trainer(strategy=FSDP2Strategy(), callbacks=[EMA()])
    check_trainer(trainer)
    trainer = tiny.trainer(strategy=FSDP2Strategy(), callbacks=[EMA(0.9)])
    with pytest.raises(UserError, match=r"trainer.callbacks: EMA cannot average sharded weights"):
        check_trainer(trainer)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_share_outside_its_range_is_refused(decay):
    with pytest.raises(UserError, match=r"ema.decay: must be at least 0 and below 1 or null"):
        EMA(decay)

"""The divergence guard: when it stops, what it leaves alone, and which checkpoints survive."""

import logging
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader

from stableqat.callbacks import BestCheckpoint, DivergenceGuard, LastCheckpoint, RunRecord
from stableqat.quantizers import STE
from stableqat.surgery import quantize_linears

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "fused": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
}


class Scripted(L.LightningModule):
    """A quantized layer whose loss in batch i is `losses[i]`, with a real gradient."""

    def __init__(self, losses, optimizer="sgd"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3))
        self.idle = nn.Parameter(torch.zeros(2))  # no loss depends on it
        quantize_linears(self.net, partial(STE, bits=4))
        self.losses, self.optimizer = losses, OPTIMIZERS[optimizer]
        self.seen = 0
        self.after_step = {0: self.weights()}

    def weights(self):
        return {name: p.detach().clone() for name, p in self.named_parameters()}

    def training_step(self, batch, batch_idx):
        value, self.seen = self.losses[self.seen], self.seen + 1
        if callable(value):
            return value(self, batch)
        real = self.net(batch).square().mean()
        return real - real.detach() + value

    def on_train_batch_end(self, *args):
        self.after_step[self.global_step] = self.weights()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch).square().mean())

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad])

    def on_save_checkpoint(self, checkpoint):
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint["seen"]

    def describe(self):
        return {"method": "STE"}


def loader(n=64):
    return DataLoader(torch.linspace(-1, 1, 4 * n).reshape(n, 4), batch_size=1)


def fit(module, folder, *callbacks, steps=60, ckpt_path=None, **options):
    trainer = L.Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": False,
            "callbacks": list(callbacks),
            "limit_val_batches": 1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": any(
                isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks
            ),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    trainer.fit(module, loader(), loader(4), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(folder: Path, name: str):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def finite(state):
    return all(tensor.isfinite().all() for tensor in state.values())


def broken_gradient(module, batch):
    """A finite loss whose gradient is NaN: sqrt at 0."""
    return module.net(batch).mul(0).sqrt().sum() + 1.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_stops_before_it_moves_anything(tmp_path, caplog, bad, optimizer):
    def times_bad(module, batch):
        return module.net(batch).square().mean() * bad

    late = optimizer == "fused"  # it skips the step by itself, and nobody waits for the loss
    module, guard = Scripted([1.0] * 4 + [times_bad] + [1.0] * 20, optimizer), DivergenceGuard()
    with caplog.at_level(logging.WARNING, logger="stableqat.callbacks.divergence"):
        trainer = fit(module, tmp_path, guard, gradient_clip_val=1.0)  # returns: no exception
    assert guard.diverged
    assert module.seen == 5 + late
    assert not same(module.after_step[3], module.after_step[4])  # it did train
    assert same(module.weights(), module.after_step[4])
    assert trainer.global_step == 5 + late
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("diverged at step 4: the loss is ")


def test_without_the_guard_the_weights_are_lost(tmp_path):
    module = Scripted([1.0, broken_gradient, 1.0])
    fit(module, tmp_path, steps=3)
    assert not finite(module.weights())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_healthy_run_is_not_touched(tmp_path, optimizer):
    losses = [3.0 + 0.9 * (i % 2) for i in range(30)]
    guarded, plain = Scripted(losses, optimizer), Scripted(losses, optimizer)
    guard = DivergenceGuard()
    fit(guarded, tmp_path, guard, steps=30)
    fit(plain, tmp_path, steps=30)
    assert not guard.diverged
    assert not guard.suspicious
    assert guard.initial_loss == 3.0
    assert same(guarded.weights(), plain.weights())


def test_the_average_must_stay_above_for_twenty_steps(tmp_path):
    """0, then 2 for ever: 2 (1 - 0.9^n) passes 1 at n = 7, the 8th step; the 20th above is the 27th."""
    module, guard = Scripted([0.0] + [2.0] * 60), DivergenceGuard()
    trainer = fit(module, tmp_path, guard)
    assert guard.diverged
    assert trainer.global_step == module.seen == 27


@pytest.mark.parametrize("dip", [26, 27])
def test_a_dip_starts_the_count_anew(tmp_path, dip):
    """A step that brings the average down before the 20th saves the run, one after it comes too late."""
    losses = [0.0] + [2.0] * 60
    losses[dip] = -100.0  # batch `dip` is step dip + 1
    module, guard = Scripted(losses), DivergenceGuard()
    trainer = fit(module, tmp_path, guard, steps=40)
    assert guard.diverged == (dip == 27)
    assert trainer.global_step == (27 if dip == 27 else 40)


def test_initial_loss_plus_one_is_not_above(tmp_path):
    module, guard = Scripted([5.0] + [6.0] * 60), DivergenceGuard()
    trainer = fit(module, tmp_path, guard, steps=60)
    assert not guard.diverged
    assert trainer.global_step == 60


def test_margin_patience_and_decay_are_options(tmp_path):
    module, guard = Scripted([0.0] + [2.0] * 60), DivergenceGuard(margin=0.1, patience=3, decay=0.0)
    assert fit(module, tmp_path, guard).global_step == 4


def test_accumulation_judges_the_mean_of_its_micro_batches(tmp_path):
    module, guard = Scripted([1.0, 3.0, 2.0, 2.0, 2.0, torch.nan, 2.0, 2.0]), DivergenceGuard()
    trainer = fit(module, tmp_path, guard, accumulate_grad_batches=2)
    assert guard.initial_loss == pytest.approx(2.0)
    assert guard.diverged
    assert module.seen == 6
    assert trainer.global_step == 3
    assert same(module.weights(), module.after_step[2])  # also the good half of step 3 is dropped


def test_good_checkpoints_survive_a_nan(tmp_path):
    module = Scripted([1.0] * 4 + [torch.nan] + [1.0] * 20)
    trainer = fit(module, tmp_path, DivergenceGuard(), BestCheckpoint(), LastCheckpoint())
    assert trainer.should_stop
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert saved(tmp_path, "last.ckpt")["global_step"] == 4
    assert same(saved(tmp_path, "last.ckpt")["state_dict"], module.after_step[4])
    assert finite(saved(tmp_path, "best.ckpt")["state_dict"])


def test_good_checkpoints_survive_weights_that_turn_nan_under_a_finite_loss(tmp_path):
    """The poisoned step itself looks healthy: only the weights tell, so they are looked at before a save."""
    for index, last in enumerate((LastCheckpoint(), LastCheckpoint(every_n_train_steps=1))):
        folder, guard = tmp_path / str(index), DivergenceGuard()
        module = Scripted([1.0] * 5 + [broken_gradient] + [1.0] * 20)  # step 6: a validation follows
        fit(module, folder, guard, BestCheckpoint(), last)
        assert guard.diverged
        assert not finite(module.weights())
        assert finite(saved(folder, "last.ckpt")["state_dict"])
        assert saved(folder, "last.ckpt")["global_step"] == (4 if index == 0 else 5)
        assert finite(saved(folder, "best.ckpt")["state_dict"])


def test_no_checkpoint_while_the_average_is_above(tmp_path):
    module = Scripted([0.0] + [2.0] * 60)
    fit(module, tmp_path, DivergenceGuard(), LastCheckpoint(every_n_train_steps=1))
    assert saved(tmp_path, "last.ckpt")["global_step"] == 7  # the average passes at step 8


def test_checkpoints_go_on_after_a_recovery(tmp_path):
    losses = [0.0] + [2.0] * 15 + [-100.0] + [0.0] * 20
    fit(Scripted(losses), tmp_path, DivergenceGuard(), LastCheckpoint(every_n_train_steps=1), steps=30)
    assert saved(tmp_path, "last.ckpt")["global_step"] == 30


def test_an_exception_saves_a_healthy_state_only(tmp_path):
    def explode(module, batch):
        raise RuntimeError("boom")

    for name, losses, step in (
        ("healthy", [0.0] * 4 + [explode], 4),
        ("suspicious", [0.0] + [2.0] * 11 + [explode], 6),
    ):
        with pytest.raises(RuntimeError, match="boom"):
            fit(Scripted(losses), tmp_path / name, DivergenceGuard(), LastCheckpoint(), val_check_interval=3)
        assert saved(tmp_path / name, "last.ckpt")["global_step"] == step


def test_a_finished_run_ends_with_its_last_state(tmp_path):
    module = Scripted([1.0] * 10)
    fit(module, tmp_path, DivergenceGuard(), LastCheckpoint(), steps=5)
    assert saved(tmp_path, "last.ckpt")["global_step"] == 5
    assert same(saved(tmp_path, "last.ckpt")["state_dict"], module.weights())


def told(caplog) -> list[str]:
    """What the guard said; others may speak, too, at a level that an earlier test has left."""
    return [record.getMessage() for record in caplog.records if record.name.endswith("divergence")]


def test_a_scale_that_is_not_finite_is_named(tmp_path, caplog):
    def poison(module, batch):
        module.net[0].weight_quantizer.scale.data[1] = torch.nan
        return module.net(batch).square().mean()

    guard = DivergenceGuard()
    with caplog.at_level(logging.WARNING, logger="stableqat.callbacks.divergence"):
        fit(Scripted([1.0, 1.0, poison, 1.0]), tmp_path, guard)
    assert guard.diverged
    assert told(caplog) == ["diverged at step 2: the loss is nan; not finite: net.0.weight_quantizer.scale"]


def test_a_weight_that_is_not_finite_is_found_without_the_loss(tmp_path, caplog):
    def poison(module, batch):
        module.idle.data[1] = torch.inf
        return module.net(batch).square().mean()

    module, guard = Scripted([1.0, 1.0, poison] + [1.0] * 20), DivergenceGuard(check_parameters_every=4)
    with caplog.at_level(logging.WARNING, logger="stableqat.callbacks.divergence"):
        trainer = fit(module, tmp_path, guard)
    assert guard.diverged
    assert trainer.global_step == 4
    assert told(caplog) == ["diverged at step 4: a parameter is not finite; not finite: idle"]


def test_a_resumed_run_is_judged_like_the_uninterrupted_one(tmp_path):
    losses = [0.0] + [2.0] * 60
    fit(Scripted(losses), tmp_path, DivergenceGuard(), LastCheckpoint(), steps=6)
    guard = DivergenceGuard()
    start = tmp_path / "checkpoints" / "last.ckpt"
    trainer = fit(Scripted(losses), tmp_path, guard, LastCheckpoint(), ckpt_path=start)
    assert guard.initial_loss == 0.0
    assert guard.diverged
    assert trainer.global_step == 27


class Memory(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


@pytest.mark.parametrize(("losses", "diverged"), [([1.0, torch.nan, 1.0], 1.0), ([1.0, 1.0, 1.0], 0.0)])
def test_divergence_is_in_the_record(tmp_path, losses, diverged):
    memory = Memory()
    fit(Scripted(losses), tmp_path, DivergenceGuard(), RunRecord(), steps=3, logger=memory)
    record = {key: value for row in memory.rows for key, value in row.items()}
    assert record["hp/diverged"] == diverged
    assert record["hp/initial_loss"] == 1.0

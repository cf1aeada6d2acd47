"""A resumed run takes the steps and counts the epochs of one that nothing disturbed."""

import os
import shutil
import signal
from contextlib import suppress

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

import tiny
from stableqat.callbacks import BestCheckpoint, DivergenceGuard, Interruption, LastCheckpoint
from stableqat.data.datamodule import DataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]

ROWS = 40
MODEL = {"config": tiny.LLAMA | {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}}


class Rows:
    def __init__(self, number):
        self.rows = tiny.rows("llama", number)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, keys):
        picked = [self.rows[max(index, 0)] for _, _, index in keys]
        return {key: torch.stack([row[key] for row in picked]) for key in picked[0]}


class Data(DataModule):
    def load(self):
        return {"train": Rows(ROWS), "validation": Rows(4)}


class Seen(L.Callback):
    """What happens, in order; ends or copies the run before a batch."""

    def __init__(self, at=None, do=None):
        self.batches, self.validations, self.epochs, self.at, self.do = [], [], [], at, do

    def on_train_epoch_start(self, trainer, *_):
        self.epochs.append(("start", trainer.current_epoch))

    def on_train_epoch_end(self, trainer, *_):
        self.epochs.append(("end", trainer.current_epoch))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(self.batches) == self.at:
            self.do(trainer)
        self.batches.append([trainer.current_epoch, batch_idx, trainer.global_step])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches[-1].append(outputs["loss"].item())

    def on_validation_end(self, trainer, *_):
        self.validations.append((trainer.fit_loop.total_batch_idx + 1, trainer.global_step))


def run(folder, ckpt_path=None, last=None, seen=None, batch_size=4, **options):
    seen = seen or Seen()
    steps = {"max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 1000}
    trainer = tiny.trainer(
        **{
            "default_root_dir": folder,
            "enable_checkpointing": True,
            "limit_val_batches": 1,
            **steps,
            **options,
        },
        callbacks=[DivergenceGuard(), Interruption(), BestCheckpoint(), LastCheckpoint(last), seen],
    )
    model = tiny.configured("llama", "stableqat", **MODEL)
    trainer.fit(model, datamodule=Data(batch_size=batch_size, seed=0), ckpt_path=ckpt_path, weights_only=True)
    seen.ended = trainer.fit_loop.epoch_progress.current
    return seen


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def processed(path):
    loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_loop.batch_progress"]["total"]["processed"]


EPOCHS = {"max_steps": -1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}
STATES = {  # how the first part ends, how the whole does: epochs have ten batches
    "validated at an epoch's end": ({"max_steps": 10}, {"val_check_interval": 10}, None),
    "validated in an epoch": ({"max_steps": 5}, {"val_check_interval": 5}, None),
    "ended with an epoch": ({"max_steps": 10}, {"limit_val_batches": 0}, None),
    "ended in an epoch": ({"max_steps": 5}, {"limit_val_batches": 0}, None),
    "saved at an epoch's last step": ({"max_steps": 10}, {}, 5),
    "epochs, validated": ({"max_epochs": 1}, EPOCHS, None),
    "epochs, not validated": ({"max_epochs": 1}, EPOCHS | {"limit_val_batches": 0}, None),
    "epochs, saved at the last step": ({"max_epochs": 1}, EPOCHS, 5),
}


@pytest.mark.parametrize("accumulate", [1, 5])
@pytest.mark.parametrize("state", STATES)
def test_steps_and_epochs_after_a_resume(state, accumulate, tmp_path):
    first, always, every = STATES[state]
    if accumulate > 1 and "max_steps" in first:
        first, every = {"max_steps": first["max_steps"] // accumulate}, every and 1
    whole = {"max_epochs": 3} if "max_epochs" in first else {"max_steps": 25 // accumulate}
    always = always | {"accumulate_grad_batches": accumulate}
    begun = run(tmp_path / "a", last=every, **{**always, **first})
    straight = run(tmp_path / "whole", last=every, **{**always, **whole})
    resumed = run(tmp_path / "b", last(tmp_path / "a"), last=every, **{**always, **whole})
    done = processed(last(tmp_path / "a"))
    assert begun.batches[:done] + resumed.batches == straight.batches
    assert resumed.epochs == straight.epochs[len(straight.epochs) - len(resumed.epochs) :]
    # one that was due after the save is made again
    assert set(begun.validations) | set(resumed.validations) == set(straight.validations)
    assert resumed.ended == straight.ended


def test_validations_wait_for_the_end_of_a_step(tmp_path):
    """Epochs of ten batches have steps of 4, 4 and 2."""
    seen = run(tmp_path, accumulate_grad_batches=4, val_check_interval=5, max_steps=7)
    assert [batch for batch, _ in seen.validations] == [8, 10, 18, 20]
    assert processed(last(tmp_path)) == 24
    alone = run(tmp_path / "alone", val_check_interval=5, max_steps=12)
    assert [batch for batch, _ in alone.validations] == [5, 10]


def kill(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


def fail(trainer):
    raise RuntimeError("something of the user's")


@pytest.mark.parametrize(("do", "saved"), [(kill, 16), (fail, 8)])
def test_a_save_holds_whole_steps(do, saved, tmp_path):
    """A signal lets the step end; what breaks it off leaves the save before."""
    options = {"accumulate_grad_batches": 4, "val_check_interval": 8, "batch_size": 1, "max_steps": 5}
    straight = run(tmp_path / "whole", **options)
    with pytest.raises((RuntimeError, SIGTERMException)):
        run(tmp_path / "cut", seen=Seen(at=13, do=do), **options)
    assert processed(last(tmp_path / "cut")) == saved
    resumed = run(tmp_path / "then", last(tmp_path / "cut"), **options)
    assert resumed.batches == straight.batches[saved:]


@pytest.mark.parametrize("do", [kill, None])
def test_the_first_batch_after_a_resume_ends_no_step(do, tmp_path):
    options = {"accumulate_grad_batches": 4, "batch_size": 1, "max_steps": 5}
    straight = run(tmp_path / "whole", last=2, **options)
    run(tmp_path / "begun", last=2, **{**options, "max_steps": 2})
    again = {}

    def act(trainer):
        if do is not None:
            do(trainer)
        elif (saved := last(tmp_path / "cut")).exists():  # one batch after the resume
            again["at"] = processed(saved)

    seen = Seen(at=0 if do else 1, do=act)
    with suppress(SIGTERMException):
        run(tmp_path / "cut", last(tmp_path / "begun"), last=2, seen=seen, **options)
    assert not again
    if do is not None:
        assert processed(last(tmp_path / "cut")) == 12
        resumed = run(tmp_path / "then", last(tmp_path / "cut"), last=2, **options)
        assert resumed.batches == straight.batches[12:]


def test_a_moved_run_knows_its_best(tmp_path):
    run(tmp_path / "old", val_check_interval=2, max_steps=4)
    shutil.move(tmp_path / "old", tmp_path / "new")
    checkpoints = tmp_path / "new" / "checkpoints"
    state = torch.load(checkpoints / "last.ckpt", weights_only=True)
    (best,) = (value for name, value in state["callbacks"].items() if name.startswith("BestCheckpoint"))
    best["best_model_score"] = torch.tensor(0.1)  # what no validation here reaches
    torch.save(state, checkpoints / "last.ckpt")
    good = (checkpoints / "best.ckpt").read_bytes()
    run(tmp_path / "new", checkpoints / "last.ckpt", val_check_interval=2, max_steps=6)
    assert (checkpoints / "best.ckpt").read_bytes() == good
    run(tmp_path / "elsewhere", checkpoints / "last.ckpt", val_check_interval=2, max_steps=8)
    assert (tmp_path / "elsewhere" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize("theirs", [True, False])
def test_no_path_in_a_checkpoint_is_removed(theirs, tmp_path):
    """Lightning's callbacks remove the checkpoint that a new one replaces, by the name in their state."""

    def go(ckpt_path, steps):
        mine = [BestCheckpoint(), LastCheckpoint(2)]
        plain = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=2)
        trainer = tiny.trainer(
            default_root_dir=folder,
            enable_checkpointing=True,
            max_steps=steps,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            limit_val_batches=1,
            callbacks=[*mine, plain] if theirs else mine,
        )
        data = Data(batch_size=4, seed=0)
        trainer.fit(
            tiny.configured("llama", **MODEL), datamodule=data, ckpt_path=ckpt_path, weights_only=True
        )

    folder, victim = tmp_path / "run", tmp_path / "victim"
    go(None, 2)
    victim.mkdir()
    (victim / "kept").touch()
    state = torch.load(last(folder), weights_only=True)
    path = str(folder / "checkpoints" / ".." / ".." / "victim")
    for name, callback in state["callbacks"].items():
        if "Checkpoint" in name:
            callback |= {"best_model_path": path, "kth_best_model_path": path, "best_model_score": None}
            callback["best_k_models"] = {path: torch.tensor(99.0)}
    torch.save(state, last(folder))
    go(last(folder), 6)
    assert (victim / "kept").exists()
    assert processed(last(folder)) == 6


def test_another_batch_size_after_an_epochs_end(tmp_path):
    """21 rows are 10 batches of 2 and 21 of 1."""

    class Odd(Data):
        def load(self):
            return {"train": Rows(21), "validation": Rows(4)}

    def go(folder, size, ckpt_path=None, **options):
        seen = Seen()
        trainer = tiny.trainer(
            default_root_dir=folder,
            enable_checkpointing=True,
            max_steps=-1,
            callbacks=[Interruption(), LastCheckpoint(5), seen],
            **options,
        )
        model, data = tiny.configured("llama", "stableqat", **MODEL), Odd(batch_size=size, seed=0)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return [epoch for epoch, *_ in seen.batches]

    assert go(tmp_path / "a", 2, max_epochs=1) == [0] * 10
    assert go(tmp_path / "b", 1, last(tmp_path / "a"), max_epochs=3) == [1] * 21 + [2] * 21

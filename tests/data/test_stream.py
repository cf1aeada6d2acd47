"""Lightning's own Trainer, stopped in every way it stops, resumes on the sample after the last one used."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from stableqat.data import ImageDataModule
from stableqat.data.datamodule import DataModule

SIZE, BATCH = 41, 4  # ten steps an epoch, one sample dropped


class Numbered:
    """A split whose samples are their own numbers."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, keys):
        return {"ids": torch.tensor([index for *_, index in keys]), "epoch": torch.tensor([keys[0][1]])}


class NumberedData(DataModule):
    def load(self):
        return {"train": Numbered(SIZE), "validation": Numbered(7)}


class Recorder(LightningModule):
    """A model that writes down the samples it saw; `fail_at` raises inside that training step once."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.validated, self.fail_at = [], [], fail_at

    def training_step(self, batch, batch_idx):
        if self.fail_at == len(self.seen):
            raise RuntimeError("pulled the plug")
        self.seen.append((int(batch["epoch"]), batch["ids"].tolist()))
        return (self.weight * batch["ids"].float()).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["ids"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(path, *, model=None, data=None, resume=None, callbacks=(), **options):
    model = model or Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            default_root_dir=path,
            accelerator="cpu",
            devices=1,
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            callbacks=list(callbacks),
            num_sanity_val_steps=0,
            **options,
        )
        trainer.fit(model, data or NumberedData(batch_size=BATCH, seed=0), ckpt_path=resume)
    return model.seen


def every_step(path):
    return ModelCheckpoint(dirpath=path, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 25, "val_check_interval": 4},
        {"max_epochs": 3, "val_check_interval": 4},
        {"max_steps": 12, "accumulate_grad_batches": 2, "limit_val_batches": 0},
        {"max_epochs": 3, "limit_train_batches": 6, "limit_val_batches": 0},
    ],
    ids=["steps", "epochs", "accumulate", "limited"],
)
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(tmp_path, options, workers):
    def data():
        return NumberedData(batch_size=BATCH, seed=0, num_workers=workers)

    whole = fit(tmp_path, data=data(), callbacks=[every_step(tmp_path)], **options)
    expected = (
        24 if "accumulate_grad_batches" in options else 18 if "limit_train_batches" in options else None
    )
    assert len(whole) == (expected or options.get("max_steps") or 30)
    accumulated = options.get("accumulate_grad_batches", 1)
    # Inside an epoch; on a validation's step; on the last step of a shortened and of a whole epoch.
    for step in (3, 5) if accumulated > 1 else (3, 4, 6, 10) if workers == 0 else (4, 10):
        resumed = fit(tmp_path, data=data(), resume=tmp_path / f"step={step}.ckpt", **options)
        assert resumed == whole[step * accumulated :], f"from step {step}"


@pytest.mark.parametrize("limit", [{"max_steps": 25}, {"max_epochs": 3}], ids=["steps", "epochs"])
def test_resume_from_an_epochs_end(tmp_path, limit):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    whole = fit(tmp_path, callbacks=[saver], **limit)
    assert fit(tmp_path, resume=tmp_path / "epoch=0.ckpt", **limit) == whole[10:]
    assert [epoch for epoch, _ in whole[::10]] == [0, 1, 2]


def test_resume_from_a_validations_end(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    whole = fit(tmp_path, callbacks=[saver], max_steps=25, val_check_interval=4)
    assert fit(tmp_path, resume=tmp_path / "step=8.ckpt", max_steps=25, val_check_interval=4) == whole[8:]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_a_step_that_raised(tmp_path, workers):
    class OnException(Callback):
        def on_exception(self, trainer, module, exception):
            trainer.save_checkpoint(tmp_path / "cut.ckpt")

    whole = fit(tmp_path, max_steps=25)
    data = NumberedData(batch_size=BATCH, seed=0, num_workers=workers)
    broken = Recorder(fail_at=13)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(tmp_path, model=broken, data=data, callbacks=[OnException()], max_steps=25)
    assert broken.seen == whole[:13]
    assert fit(tmp_path, resume=tmp_path / "cut.ckpt", max_steps=25) == whole[13:]


def test_a_second_fit_of_one_data_module_starts_over(tmp_path):
    data = NumberedData(batch_size=BATCH, seed=0)
    assert fit(tmp_path, data=data, max_steps=5) == fit(tmp_path, data=data, max_steps=5)


def test_epochs_that_take_a_part_go_through_all_of_it(tmp_path):
    seen = fit(tmp_path, max_epochs=5, limit_train_batches=2, limit_val_batches=0)
    assert len({index for _, ids in seen for index in ids}) == 40


def test_overfitting_repeats_the_same_samples(tmp_path):
    seen = fit(tmp_path, max_epochs=4, overfit_batches=1)
    assert len(seen) == 4
    assert {tuple(sorted(ids)) for _, ids in seen} == {(0, 1, 2, 3)}


def test_reloaded_loaders_go_on(tmp_path):
    options = {"max_epochs": 3, "limit_val_batches": 0}
    assert fit(tmp_path, reload_dataloaders_every_n_epochs=1, **options) == fit(tmp_path, **options)


def test_the_runs_seed_decides_where_none_is_given(tmp_path, monkeypatch):
    def seen(seed):
        return fit(tmp_path, data=NumberedData(batch_size=BATCH, seed=seed), max_steps=3)

    default = seen(None)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert seen(None) == seen(5) != default == seen(0)


def test_validation_and_prediction_see_every_sample_once(tmp_path):
    model = Recorder()
    model.predict_step = lambda batch, batch_idx: batch["ids"].tolist()
    data = NumberedData(batch_size=BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False
        )
        trainer.validate(model, data, verbose=False)
        assert model.validated == list(range(7))
        assert [index for batch in trainer.predict(model, data) for index in batch] == list(range(7))


def test_augmented_images_are_the_same_after_a_resume(tmp_path):
    class Pixels(Recorder):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch["pixel_values"].sum(dim=(1, 2, 3)).tolist())
            return self.weight.sum()

        def validation_step(self, batch, batch_idx):
            pass

    def run(workers, resume=None, callbacks=()):
        data = ImageDataModule(batch_size=600, seed=3, num_workers=workers)
        return fit(tmp_path, model=Pixels(), data=data, resume=resume, callbacks=callbacks, max_steps=6)

    whole = run(0, callbacks=[every_step(tmp_path)])
    assert run(2) == whole
    assert run(2, resume=tmp_path / "step=3.ckpt") == whole[3:]

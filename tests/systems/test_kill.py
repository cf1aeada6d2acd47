"""A run that is killed and resumed is the run that was not: every loss, and the last checkpoint, bit for bit.

Each run crosses the borders of Lightning's epochs (5 steps), has dropout and, for images,
augmentation and mixup. DSQ is the method, as it learns most.
"""

from functools import cache
from pathlib import Path

import forked
import pytest
import torch

from stableqat.events import read_run

STEPS = 12
DROPOUT = {
    "llama": ["--model.config.attention_dropout", "0.2"],
    "vit": ["--model.mixup_alpha", "0.8", "--model.cutmix_alpha", "1", "--model.model_args.drop_rate", "0.1",
            "--model.model_args.drop_path_rate", "0.1", "--data.augment", "true"],
}  # fmt: skip


def arguments(family: str, folder: Path, version: str, workers: int = 0) -> list[str]:
    configs = [f"configs/{family}/{name}.yaml" for name in ("base", "debug", "dsq")]
    return [
        "fit",
        *[part for config in configs for part in ("-c", config)],
        *DROPOUT[family],
        *f"--trainer.max_steps {STEPS} --trainer.limit_train_batches 5 --trainer.accelerator cpu".split(),
        *f"--trainer.val_check_interval 4 --data.num_workers {workers}".split(),
        *f"--trainer.logger.save_dir {folder} --trainer.logger.name {family}".split(),
        *["--trainer.logger.version", version],
    ]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def trace(folder: Path) -> dict[str, dict[int, float]]:
    return read_run(folder, ("train/", "val/", "lr-")).scalars


class Runs:
    """Runs that several tests look at, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = cache(self._whole)
        self.resumed = cache(self._resumed)

    def _whole(self, family: str) -> Path:
        save = ["--last.every_n_train_steps", "3"]
        forked.succeed(arguments(family, self.folder, "whole") + save, self.folder / "log")
        return self.folder / family / "whole"

    def _resumed(self, family: str, workers: int, how: str) -> Path:
        """Cut short after the 7th step and resumed: after SIGKILL from the 6th, the last one saved."""
        version = f"{how}-{workers}"
        run = arguments(family, self.folder, version, workers)
        if how == "kill":
            run += ["--last.every_n_train_steps", "3"]
        folder = self.folder / family / version
        stop = [
            "--trainer.callbacks+=probes.Cut",
            *f"--trainer.callbacks.step 7 --trainer.callbacks.how {how}".split(),
        ]
        codes = forked.command(run + stop, self.folder / "log")
        assert codes == [{"kill": -9, "terminate": 143, "raise": 1}[how]]
        assert checkpoint(folder)["global_step"] == (6 if how == "kill" else 7)
        assert max(trace(folder)["train/loss"]) >= (5 if how == "kill" else 6)
        forked.succeed([*run, "--ckpt_path", "last"], self.folder / "log")
        assert len(list(folder.glob("events.*"))) == 2
        return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("kill"))


CASES = [
    ("llama", 0, "kill"),
    pytest.param("llama", 2, "kill", marks=pytest.mark.slow),
    pytest.param("vit", 0, "kill", marks=pytest.mark.slow),
    ("vit", 2, "kill"),
    pytest.param("llama", 0, "terminate", marks=pytest.mark.slow),
    pytest.param("vit", 0, "raise", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "workers", "how"), CASES)
def test_every_loss_is_that_of_the_uninterrupted_run(family, workers, how, runs):
    whole = trace(runs.whole(family))
    assert list(whole["train/loss"]) == list(range(STEPS))
    assert len(set(whole["train/loss"].values())) == STEPS
    assert list(whole["val/loss"]) == [3, 7, 11]
    assert trace(runs.resumed(family, workers, how)) == whole


@pytest.mark.parametrize(("family", "workers", "how"), CASES[:4])
def test_the_last_checkpoint_is_that_of_the_uninterrupted_run(family, workers, how, runs):
    whole, resumed = checkpoint(runs.whole(family)), checkpoint(runs.resumed(family, workers, how))
    assert not list(differing(whole, resumed))


@pytest.mark.parametrize("family", DROPOUT)
def test_what_a_checkpoint_must_hold_has_moved(family, runs):
    """Otherwise the comparison would prove little."""
    saved = checkpoint(runs.whole(family))
    learned = {key: value for key, value in saved["state_dict"].items() if ".weight_quantizer." in key}
    assert {key.rsplit(".", 1)[1] for key in learned} == {"scale", "scale_floor", "a_logit"}
    assert all(value.unique().numel() > 1 for key, value in learned.items() if key.endswith("a_logit"))
    assert saved["lr_schedulers"][0]["last_epoch"] == STEPS
    guard = next(state for name, state in saved["callbacks"].items() if name.startswith("DivergenceGuard"))
    assert guard["average"] != guard["initial_loss"]


def test_the_record_remembers_the_losses_before_the_cut(runs):
    """A resumed run opens its record with what it knew, not with NaN over the last validation."""
    folder = runs.resumed("llama", 0, "kill")
    loss = read_run(folder).scalars["hp/val_loss"]
    assert loss[6] == loss[4] == read_run(folder).scalars["val/loss"][3]


def differing(one, other, path=""):
    """Paths at which two checkpoints differ, but for the folder that a checkpoint callback remembers."""
    if isinstance(one, torch.Tensor):
        if not torch.equal(one, other):
            yield path
    elif isinstance(one, dict):
        if "dirpath" in one:
            return
        if one.keys() != other.keys():
            yield f"{path}: {one.keys() ^ other.keys()}"
        for key in one.keys() & other.keys():
            yield from differing(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differing(*pair, f"{path}/{number}")
    elif one != other:
        yield f"{path}: {one}, {other}"

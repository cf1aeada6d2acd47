"""The trajectory logs what it says, and training does not notice."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import tiny
from stableqat.callbacks import Trajectory
from stableqat.errors import UserError
from stableqat.events import read_run
from stableqat.landscape.codes import kept_codes, read_codes
from stableqat.landscape.space import WeightSpace, norm
from stableqat.layers.full_precision import full_precision

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]
FAMILIES = ["llama", "vit"]


class Seen(L.Callback):
    """What the trajectory must report, measured in another way."""

    def __init__(self, batches):
        self.batches, self.rows, self.codes = batches, {}, {}

    def on_train_start(self, trainer, pl_module):
        self.look(pl_module, 0)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.look(pl_module, trainer.global_step)

    @torch.no_grad()
    def look(self, module, step):
        space = WeightSpace(module)
        self.codes[step] = [each.codes for each in space.quantized()]
        pl, mode = module.model, module.model.training
        pl.eval()
        deployed = torch.stack([self.loss(module, batch) for batch in self.batches]).mean()
        with full_precision(pl):
            latent = torch.stack([self.loss(module, batch) for batch in self.batches]).mean()
        pl.train(mode)
        way = [b - a for a, b in zip(space.get(), space.deployed(), strict=True)]
        self.rows[step] = [latent.item(), deployed.item(), (norm(way) / norm(space.get())).item()]

    def loss(self, module, batch):
        if module.family == "text":
            return module.loss(batch)
        return nn.functional.cross_entropy(module(batch["pixel_values"]), batch["labels"])


def fit(folder, family, *callbacks, method="ste", **options):
    module = tiny.configured(family, method, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
    logger = TensorBoardLogger(str(folder), name="", version="run")
    options = {"max_steps": 6, "limit_val_batches": 2, "val_check_interval": 4, "logger": logger} | options
    losses = tiny.Losses()
    trainer = tiny.trainer(callbacks=[losses, *callbacks], **options)
    loaders = tiny.loader(family, 24, 4), tiny.loader(family, 8, 4)
    trainer.fit(module, *loaders)
    return losses.values, module


@pytest.mark.parametrize("family", FAMILIES)
def test_it_logs_losses_distance_and_flips(family, tmp_path):
    seen = Seen(list(tiny.loader(family, 8, 4)))
    fit(tmp_path, family, seen, Trajectory(every_n_steps=3))
    found = read_run(tmp_path / "run", ("landscape/",)).scalars
    for place, what in enumerate(("loss_latent", "loss_deployed", "distance")):
        expected = {step: seen.rows[step][place] for step in (0, 3, 6)}
        assert found[f"landscape/{what}"] == pytest.approx(expected, rel=1e-4)
    flips = {}
    for before, after in ((0, 3), (3, 6)):
        pairs = list(zip(seen.codes[before], seen.codes[after], strict=True))
        flips[after] = sum((a != b).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    assert found["landscape/code_flips"] == pytest.approx(flips)
    assert flips[3] > 0
    assert seen.rows[0][0] != seen.rows[0][1]
    assert not (tmp_path / "run" / "trajectory").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_does_not_notice(family, tmp_path):
    options = {"accumulate_grad_batches": 2, "max_steps": 3, "precision": "bf16-mixed"}
    plain, first = fit(tmp_path / "a", family, **options)
    watched, second = fit(tmp_path / "b", family, Trajectory(every_n_steps=1, keep_codes=True), **options)
    assert plain == watched
    assert len(plain) == 6
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_codes_are_kept_by_step(tmp_path):
    seen = Seen([])
    seen.look = lambda module, step: seen.codes.update({step: list(WeightSpace(module).quantized())})
    _, module = fit(tmp_path, "llama", seen, Trajectory(every_n_steps=2, batches=1, keep_codes=True))
    files = kept_codes(tmp_path / "run")
    assert list(files) == [0, 2, 4, 6]
    for step, file in files.items():
        for found, known in zip(read_codes(WeightSpace(module), file), seen.codes[step], strict=True):
            assert torch.equal(found.codes, known.codes)
            assert torch.equal(found.scale, known.scale)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_resumed_run_measures_the_steps_that_are_left(tmp_path):
    logger, data = TensorBoardLogger(str(tmp_path), name="", version="part"), tiny.loader("llama", 24, 4)
    options = {"limit_val_batches": 2, "logger": logger}
    first = tiny.trainer(max_steps=3, **options)
    first.fit(tiny.configured("llama"), data, data)
    first.save_checkpoint(tmp_path / "at3.ckpt")
    trainer = tiny.trainer(max_steps=6, callbacks=[Trajectory(every_n_steps=2)], **options)
    trainer.fit(tiny.configured("llama"), data, data, ckpt_path=tmp_path / "at3.ckpt")
    found = read_run(tmp_path / "part", ("landscape/",)).scalars
    assert list(found["landscape/loss_latent"]) == [4, 6]
    assert list(found["landscape/code_flips"]) == [6]


def test_nothing_in_full_precision_and_nothing_by_default(tmp_path):
    fit(tmp_path / "fp", "llama", Trajectory(every_n_steps=1, keep_codes=True), method="fp", max_steps=1)
    fit(tmp_path / "off", "llama", Trajectory(), max_steps=1)
    for name in ("fp", "off"):
        assert not read_run(tmp_path / name / "run", ("landscape/",)).scalars


def test_what_it_cannot_measure_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^trajectory\.every_n_steps: needs validation data"):
        fit(tmp_path, "llama", Trajectory(every_n_steps=1), limit_val_batches=0)
    with pytest.raises(UserError, match=r"^trajectory\.every_n_steps: LightningModule is not a training sys"):
        Trajectory(every_n_steps=1).setup(tiny.trainer(), L.LightningModule(), "fit")

"""The same `hp/*` for every run, so that the HParams tab joins methods, learning rates and families."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from math import isnan
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import backend_context
from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_FLOAT64, DATA_TYPE_STRING

import tiny
from stableqat.analysis.arms import Result, usable
from stableqat.callbacks import DivergenceGuard, RunRecord
from stableqat.callbacks.tabs import COMPARED_BY
from stableqat.events import MEANS, read_run
from stableqat.modules import CosineWarmup
from stableqat.quantizers import StableQAT

ALL = {
    f"hp/{what}" for what in ("val_loss", "best_val_loss", "initial_loss", "diverged", "steps", "finished")
}
ALL |= {"hp/loss_fp", "hp/loss_ptq"}
RUNS = [("llama", "fp"), ("llama", "dsq"), ("vit", "stableqat"), ("vit", "paretoq")]


def recorded(folder: Path, family: str, method: str, verb: str = "fit", before: Sequence = (), **options):
    logger = TensorBoardLogger(folder, family, f"{method}-{verb}", default_hp_metric=False)
    callbacks = [*before, DivergenceGuard(), RunRecord()]
    trainer = tiny.trainer(
        max_steps=4,
        logger=logger,
        callbacks=callbacks,
        limit_val_batches=1,
        val_check_interval=1,
        log_every_n_steps=1,
    )
    module = tiny.module(family, method, **options)
    if verb == "fit":
        trainer.fit(module, tiny.loader(family, 32, 8), tiny.loader(family))
    else:
        trainer.validate(module, tiny.loader(family), verbose=False)
    return read_run(Path(logger.log_dir), ("",)), Path(logger.log_dir)


def plugin_data(folder: Path) -> dict[str, bytes]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for file in folder.glob("events.*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    found[value.tag] = value.metadata.plugin_data.content
    return found


def test_a_run_keeps_which_share_of_its_weights_is_quantized(runs):
    for (family, method), (run, folder) in runs.items():
        kept = folder / "surgery.txt"
        assert kept.exists() == (method != "fp")
        share = run.hparams.get("quantized_share")
        if method == "fp":
            assert share is None
            continue
        assert share == {"llama": 1, "vit": 0.9948}[family]
        layer = {"llama": "model.layers.0.mlp.up_proj", "vit": "blocks.0.mlp.fc1"}[family]
        assert f"\n  {layer}: {run.hparams['method']} 2-bit {run.hparams['grid']}\n" in kept.read_text()
        assert f"{share:.1%} of the matrix weights" in kept.read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    return {pair: recorded(folder, *pair) for pair in RUNS}


@pytest.mark.parametrize("pair", RUNS)
def test_every_run_logs_the_same_metrics(pair, runs):
    run, _ = runs[pair]
    assert {tag for tag in run.scalars if tag.startswith("hp")} == ALL
    losses = run.scalars["val/loss"].values()
    assert run.last("hp/val_loss") == list(losses)[-1]
    assert run.last("hp/best_val_loss") == min(losses)
    assert run.last("hp/initial_loss") == run.scalars["train/loss"][0]
    assert (run.last("hp/diverged"), run.last("hp/steps"), run.last("hp/finished")) == (0, 4, 1)
    assert "hp_metric" not in run.scalars


@pytest.mark.parametrize("pair", RUNS)
def test_the_hparams_tab_finds_the_run(pair, runs):
    """One experiment and one session, with the metrics that every run has."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run, folder = runs[pair]
    data = {tag: HParamsPluginData.FromString(content) for tag, content in plugin_data(folder).items()}
    assert set(data) == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    experiment = data["_hparams_/experiment"].experiment
    assert {info.name.tag for info in experiment.metric_infos} == ALL
    assert {info.name for info in experiment.hparam_infos} == {*run.hparams, *COMPARED_BY}


@pytest.fixture(scope="module")
def tensorboard(runs):
    """TensorBoard's own view of all runs."""
    multiplexer = EventMultiplexer(size_guidance={"tensors": 0})
    for (family, method), (_, folder) in runs.items():
        multiplexer.AddRun(str(folder), f"{family}-{method}")
    multiplexer.Reload()
    return TBContext(data_provider=MultiplexerDataProvider(multiplexer, ""))


def test_the_hparams_tab_ticks_what_runs_are_compared_by(tensorboard):
    """TensorBoard takes the columns from the first run, here in full precision, and ticks the first five."""
    context = backend_context.Context(tensorboard)
    content = context.hparams_metadata(RequestContext(), "")
    assert next(iter(content)) == "llama-fp"
    found = context.experiment_from_metadata(RequestContext(), "", True, content, [])
    assert {info.name for info in found.hparam_infos[:5]} == {"method", "bits", "grid", "lr", "seed"}
    kinds = {info.name: info.type for info in found.hparam_infos}
    assert (kinds["method"], kinds["bits"]) == (DATA_TYPE_STRING, DATA_TYPE_FLOAT64)
    assert len(kinds) == len(found.hparam_infos) > 10


def test_the_custom_scalars_tab_draws_losses_first_and_only_what_runs_log(tensorboard, runs):
    layout = json.loads(CustomScalarsPlugin(tensorboard).layout_impl(RequestContext(), ""))
    charts = {c["title"]: [chart["title"] for chart in c["chart"]] for c in layout["category"]}
    assert list(charts) == ["Loss", "Training", "Quantizers"]
    assert charts["Loss"] == ["validation", "training", "validation top-1"]
    tags = {tag for run, _ in runs.values() for tag in run.scalars}
    wanted = [tag for c in layout["category"] for chart in c["chart"] for tag in chart["multiline"]["tag"]]
    logged = [any(re.match(each, tag) for tag in tags) for each in wanted if "quant" not in each]
    assert logged == [True] * 4 + [False]  # no monitor of learning rates here
    drawn = [each.strip("^$").removeprefix("quant/").strip("()") for each in wanted if "quant" in each]
    assert {name for each in drawn for name in each.split("|")} <= {*MEANS, "oscillating", "frozen"}


def test_the_settings_that_a_comparison_reads_are_flat_and_resolved(runs):
    shared = {"method", "seed", "lr", "max_steps", "subcommand", "scale_lr_multiplier", "optimizer"}
    shared |= {"weight_decay", "gradient_clip_val"}
    quantized = {"bits", "grid", "mask", "scale_init", "granularity"}
    settings = {method: run.hparams for (_, method), (run, _) in runs.items()}
    assert all(shared <= set(each) for each in settings.values())
    assert all(quantized <= set(each) for method, each in settings.items() if method != "fp")
    assert {method: each["method"] for method, each in settings.items()} == {
        "fp": "FP", "dsq": "DSQ", "stableqat": "StableQAT", "paretoq": "ParetoQ"
    }  # fmt: skip
    assert settings["paretoq"]["grid"] == "stretched"
    assert settings["dsq"]["a"] == 0.2
    assert settings["stableqat"]["amplitude"] == 0.21
    assert settings["stableqat"]["max_steps"] == 4
    assert settings["stableqat"]["subcommand"] == "fit"
    assert "bits" not in settings["fp"]


def test_the_learning_rate_is_the_peak_not_that_of_the_first_step(tmp_path):
    run, _ = recorded(
        tmp_path,
        "llama",
        "ste",
        optimizer=partial(torch.optim.AdamW, lr=0.25),
        lr_scheduler=partial(CosineWarmup, warmup_steps=2),
        quantizer=partial(StableQAT, bits=3, group_size=16),
    )
    assert run.hparams["lr"] == 0.25
    assert run.hparams["granularity"] == "group 16"


class Break(L.Callback):
    """After three steps no weight is a number."""

    def on_validation_start(self, trainer, module):
        if trainer.global_step == 3:
            for parameter in module.parameters():
                parameter.data.fill_(torch.nan)


def test_a_run_that_diverges_keeps_its_best_loss(tmp_path):
    run, _ = recorded(tmp_path, "llama", "ste", before=[Break()])
    first, second, *broken = run.scalars["val/loss"].values()
    assert all(map(isnan, [*broken, run.last("hp/val_loss")]))
    assert run.last("hp/best_val_loss") == min(first, second)


def test_a_run_that_only_validates_has_a_record_too(tmp_path):
    run, _ = recorded(tmp_path, "vit", "ste", verb="validate")
    assert {tag for tag in run.scalars if tag.startswith("hp")} == ALL
    assert run.last("hp/val_loss") == run.last("val/loss")
    assert run.hparams["subcommand"] == "validate"
    assert run.hparams["method"] == "STE"


class Stop(L.Callback):
    """In the second epoch the run is told to end."""

    def on_train_batch_end(self, trainer, module, *_):
        trainer._signal_connector.received_sigterm = trainer.current_epoch == 1


@pytest.mark.parametrize(("callbacks", "finished"), [([], True), ([Stop()], False)])
def test_a_run_of_epochs_says_whether_it_made_them(callbacks, finished, tmp_path, caplog):
    logger = TensorBoardLogger(tmp_path, "", "", default_hp_metric=False)
    callbacks = [*callbacks, RunRecord()]
    length = {"max_steps": -1, "max_epochs": 3, "limit_val_batches": 1, "log_every_n_steps": 1}
    trainer = tiny.trainer(**length, logger=logger, callbacks=callbacks)
    with suppress(SIGTERMException):
        trainer.fit(tiny.module("llama", "ste"), tiny.loader("llama"), tiny.loader("llama"))
    run = read_run(tmp_path)
    assert run.hparams["max_steps"] == -1
    assert run.last("hp/finished") == finished
    assert usable(Result.of(run)) == finished
    unfinished = [message for message in caplog.messages if "is unfinished: it was cut at step 2" in message]
    assert len(unfinished) == (not finished)


class Cut(L.Callback):
    """The run is cut between its last checkpoint and its end."""

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(Path(trainer.log_dir) / "last.ckpt")
        raise SIGTERMException


def test_a_run_that_was_cut_with_nothing_left_to_do_is_finished_when_it_resumes(tmp_path):
    length = {"max_steps": -1, "max_epochs": 1, "limit_val_batches": 1, "log_every_n_steps": 1}
    for callbacks, resume in (([Cut()], None), ([], tmp_path / "last.ckpt")):
        logger = TensorBoardLogger(tmp_path, "", "", default_hp_metric=False)
        trainer = tiny.trainer(**length, logger=logger, callbacks=[*callbacks, RunRecord()])
        with suppress(SIGTERMException):
            trainer.fit(tiny.module("llama"), tiny.loader("llama"), tiny.loader("llama"), ckpt_path=resume)
        assert usable(Result.of(read_run(tmp_path))) == (resume is not None)


def test_what_led_to_a_checkpoint_is_on_disk_with_it(tmp_path):
    """TensorBoard's writer holds records back for two minutes where its file system buffers."""
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    trainer = tiny.trainer(max_steps=2, logger=logger, callbacks=[RunRecord()], log_every_n_steps=1)
    trainer.fit(tiny.module("llama"), tiny.loader("llama"), tiny.loader("llama"))
    flushed = []
    logger.experiment.flush = lambda: flushed.append(True)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert flushed

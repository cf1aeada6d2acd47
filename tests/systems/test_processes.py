"""Two processes (gloo, DDP and FSDP2) train as one does on the same global batch.

In float32 the first step must agree to rounding. Later a code may flip in one run and not in the
other, so twelve steps must agree to 1e-2 only.
"""

from functools import cache
from pathlib import Path

import forked
import pytest
import torch

from stableqat.data import ImageDataModule, TextDataModule
from stableqat.events import read_run
from stableqat.modules import LlamaModule, ViTModule

STEPS, CLIP = 12, 0.05
ROWS = {"llama": 8, "vit": 32}
FAMILIES = list(ROWS)
PROCESSES = {"auto": 1, "ddp": 2, "fsdp2": 2}
OVERLAYS = {"ddp": "ddp", "fsdp2": "fsdp"}


def arguments(
    family: str, folder: Path, version: str, strategy: str, verb: str = "fit", **flags
) -> list[str]:
    """A run with the same rows a step, whatever the number of processes."""
    processes = PROCESSES[strategy]
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.strategy": strategy,
        "trainer.devices": processes,
        "trainer.gradient_clip_val": CLIP,
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": STEPS // 2,
        "data.batch_size": ROWS[family] // processes,
        "trainer.logger.save_dir": folder,
        "trainer.logger.name": family,
        "trainer.logger.version": version,
        **{key.replace("__", "."): value for key, value in flags.items()},
    }
    overlays = ["base", "debug", "stableqat"]
    if family == "vit" and verb == "fit" and strategy in OVERLAYS:  # by its file rather than by its flag
        del settings["trainer.strategy"]
        overlays.append(OVERLAYS[strategy])
    configs = [f"configs/{family}/{name}.yaml" for name in overlays]
    arguments = [part for config in configs for part in ("-c", config)]
    return [verb, *arguments, *[part for key, value in settings.items() for part in (f"--{key}", str(value))]]


def probe(path: Path) -> list[str]:
    return ["--trainer.callbacks+=probes.Probe", "--trainer.callbacks.path", str(path)]


class Runs:
    """Runs that several tests look at, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.probed = cache(self._probed)

    def _probed(self, family: str, strategy: str, precision: str = "32-true", steps: int = STEPS) -> dict:
        version = f"{strategy}-{precision}"
        result = self.folder / f"{family}-{version}.pt"
        flags = {"trainer__precision": precision, "trainer__max_steps": steps}
        argv = arguments(family, self.folder, version, strategy, **flags) + probe(result)
        forked.succeed(argv, self.folder / "log", PROCESSES[strategy])
        return torch.load(result, weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_measure_the_start_as_one_does(family, strategy, runs):
    def measured(strategy):
        runs.probed(family, strategy)
        run = read_run(runs.folder / family / f"{strategy}-32-true", ("hp/loss_",))
        return [run.last(f"hp/loss_{which}") for which in ("fp", "ptq")]

    assert measured(strategy) == pytest.approx(measured("auto"), rel=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_train_as_one(family, strategy, runs):
    one, two = runs.probed(family, "auto"), runs.probed(family, strategy)
    assert two["sharded"] == (strategy == "fsdp2")
    for name, weight in one["weights"].items():
        assert torch.equal(two["weights"][name], weight), name
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6)
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).norm() <= 2e-6 * gradient.norm(), name
    assert len(one["losses"]) == STEPS
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-2)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_gradients_are_clipped_to_the_norm_of_all_processes(strategy, runs):
    run = runs.probed("llama", strategy)
    first = torch.stack([gradient.norm() for gradient in run["gradients"].values()]).norm()
    assert first > 2 * CLIP
    assert run["clipped_norms"] == pytest.approx([CLIP] * len(run["clipped_norms"]), rel=1e-4)
    assert len(run["clipped_norms"]) > STEPS // 2


def test_the_quantizers_of_shards_are_monitored(runs):
    """The first process's rows: other rows than one process samples, but alike."""
    logged = {}
    for strategy in ("auto", "fsdp2"):
        runs.probed("llama", strategy)
        scalars = read_run(runs.folder / "llama" / f"{strategy}-32-true", ("quant/",)).scalars
        logged[strategy] = {tag: series[STEPS - 1] for tag, series in scalars.items() if STEPS - 1 in series}
    one, shards = logged["auto"], logged["fsdp2"]
    assert one.keys() == shards.keys() >= {"quant/flip_rate", "quant/snr_db", "quant/scale_drift"}
    assert shards["quant/snr_db"] == pytest.approx(one["quant/snr_db"], abs=0.5)
    assert shards["quant/scale_drift"] == pytest.approx(one["quant/scale_drift"], rel=0.5)
    assert all(value == value for value in shards.values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_a_step_asks_of_other_processes(strategy, tmp_path):
    """The labels' number, the loss for the log and for the guard, whether to stop. No barrier, no broadcast.

    Gradients, and under FSDP2 their norm, go by other ways, which are not counted.
    """
    flags = {"trainer__max_steps": 4, "trainer__val_check_interval": 100}
    argv = arguments("llama", tmp_path, "run", strategy, **flags)
    argv += ["--trainer.callbacks+=probes.Collectives", "--trainer.callbacks.path", str(tmp_path / "counts")]
    forked.succeed(argv, tmp_path / "log", 2)
    assert torch.load(tmp_path / "counts", weights_only=True)[:3] == [{"all_reduce": 4}] * 3


@pytest.mark.parametrize("family", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("start", "then"), [("fsdp2", "auto"), ("auto", "fsdp2")])
def test_any_strategy_resumes_what_another_saved(family, start, then, runs):
    """One process goes on from FSDP2's file and the reverse, optimizer and scheduler included."""
    straight = runs.probed(family, start)["losses"]
    halfway = runs.folder / f"{family}-{start}-32-true.ckpt"
    assert torch.load(halfway, weights_only=True)["global_step"] == STEPS // 2
    result = runs.folder / f"{family}-{start}-{then}.pt"
    run = [*arguments(family, runs.folder, f"{start}-{then}", then), "--ckpt_path", str(halfway)]
    run += [*probe(result), "--trainer.callbacks.keep_at", "-1"]
    forked.succeed(run, runs.folder / "log", PROCESSES[then])
    resumed = torch.load(result, weights_only=True)
    assert resumed["losses"] == pytest.approx(straight[STEPS // 2 :], abs=1e-2)
    assert resumed["losses"][0] == pytest.approx(straight[STEPS // 2], rel=1e-5)


@pytest.mark.parametrize(("family", "module"), [("llama", LlamaModule), ("vit", ViTModule)])
def test_a_sharded_run_saves_one_file_that_loads_without_arguments(family, module, runs):
    runs.probed(family, "fsdp2")
    runs.probed(family, "auto")
    one, two = (
        torch.load(
            runs.folder / family / f"{strategy}-32-true" / "checkpoints" / "last.ckpt", weights_only=True
        )
        for strategy in ("auto", "fsdp2")
    )
    shapes = [{name: value.shape for name, value in file["state_dict"].items()} for file in (one, two)]
    assert shapes[0] == shapes[1]
    loaded = module.load_from_checkpoint(runs.folder / family / "fsdp2-32-true" / "checkpoints" / "last.ckpt")
    assert loaded.state_dict().keys() == two["state_dict"].keys()
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in loaded.state_dict().items())


def test_sharded_masters_stay_in_float32_under_mixed_precision(runs):
    """FSDP2's own mixed precision would hand the quantizers bfloat16 weights: other codes than DDP's."""
    run = runs.probed("llama", "fsdp2", "bf16-mixed", 2)
    assert set(run["types"]) == {"torch.float32 torch.bfloat16"}
    assert {weight.dtype for weight in run["weights"].values()} == {torch.float32}
    assert run["losses"][0] == pytest.approx(runs.probed("llama", "auto")["losses"][0], rel=1e-3)


def ragged(family: str) -> dict[str, int]:
    """Data settings that leave one validation sample to the last batch of two processes."""
    if family == "vit":
        size, sizes = len(ImageDataModule().splits["validation"]), [None]
    else:
        size, sizes = TextDataModule(vocab_size=512).splits["validation"].num_tokens, range(32, 64)
    return next(
        {"batch_size": batch_size, **({"block_size": block_size} if block_size else {})}
        for block_size in sizes
        for batch_size in range(40, 80)
        if size // (block_size or 1) % (2 * batch_size) == 1
    )


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_validation_counts_every_sample_once(family, strategy, runs):
    """The second process has none of the last batch's samples, but a row of padding."""
    data = ragged(family)
    metrics = []
    for kind in ("auto", strategy):
        rows = {**data, "batch_size": data["batch_size"] * 2 // PROCESSES[kind]}
        flags = {f"data__{key}": value for key, value in rows.items()}
        version = f"validate-{kind}-for-{strategy}"
        argv = arguments(
            family, runs.folder, version, kind, verb="validate", trainer__limit_val_batches=1.0, **flags
        )
        forked.succeed(argv, runs.folder / "log", PROCESSES[kind])
        scalars = read_run(runs.folder / family / version, ("val/",)).scalars
        metrics.append({tag: values[0] for tag, values in scalars.items()})
    assert metrics[0].keys() >= ({"val/perplexity"} if family == "llama" else {"val/top1", "val/top5"})
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6)

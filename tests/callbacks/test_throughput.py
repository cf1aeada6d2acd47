"""Throughput is what a stopwatch would say, and MFU what the model's arithmetic says."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

import tiny
from stableqat.callbacks import Throughput
from stableqat.callbacks import throughput as seam
from stableqat.callbacks.throughput import peak_flops, training_flops, untimed

SECONDS = 0.05  # on a clock that only the tests advance


class Clock:
    """Time stands still but for what is slept."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


time = Clock()


@pytest.fixture(autouse=True)
def _no_clock_of_the_machine(monkeypatch):
    monkeypatch.setattr(seam, "time", time)


class Slow(list):
    """Rows that take their time."""

    def __getitem__(self, index):
        time.sleep(SECONDS / 4)
        return super().__getitem__(index)


class Recorder(Logger):
    """Keeps `perf/*`: key, step, value."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        for key, value in metrics.items():
            if key.startswith("perf/"):
                self.seen.setdefault(key, {})[step] = value

    def log_hyperparams(self, *args, **kwargs): ...


class Steady(L.Callback):
    """Makes a step take a known time, and validations and the first step a long one."""

    def on_train_batch_start(self, trainer, *_):
        time.sleep(SECONDS if trainer.global_step else 10 * SECONDS)

    def on_validation_start(self, trainer, pl_module):
        time.sleep(10 * SECONDS)


def fit(family="llama", rows=None, size=4, **options):
    logger = Recorder()
    rows = tiny.rows(family, 64) if rows is None else rows
    callbacks = [Throughput(), Steady()]
    options = {"max_steps": 8, "log_every_n_steps": 4, "logger": logger, "callbacks": callbacks, **options}
    validation = DataLoader(tiny.rows(family, 4), 4)
    module = tiny.module(family)
    tiny.trainer(**options).fit(module, DataLoader(rows, size), validation)
    return logger.seen


@pytest.mark.parametrize(("family", "what"), [("llama", "perf/tokens_per_s"), ("vit", "perf/images_per_s")])
def test_it_logs_what_a_stopwatch_says(family, what):
    seen = fit(family, limit_val_batches=1, val_check_interval=4)
    assert seen.keys() == {what, "perf/step_ms", "perf/loader_wait"}
    for step in (4, 8):
        assert list(seen[what]) == [4, 8]
        took = seen["perf/step_ms"][step] / 1000
        assert took == pytest.approx(SECONDS)
        assert seen[what][step] * took == pytest.approx(64 if family == "llama" else 4)


class Busy(L.Callback):
    """Does something else at either end of a step."""

    def on_train_batch_start(self, trainer, *_):
        with untimed(trainer):
            time.sleep(5 * SECONDS)

    def on_train_batch_end(self, trainer, *_):
        self.on_train_batch_start(trainer)


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_no_training_is_left_out(order):
    callbacks = [Throughput(), Steady(), Busy()][::order]
    seen = fit(callbacks=callbacks)
    for took in seen["perf/step_ms"].values():
        assert took / 1000 == pytest.approx(SECONDS)


def test_never_to_log_is_no_error():
    assert fit(log_every_n_steps=0, max_steps=2) == {}


def test_accumulated_micro_batches_are_one_step():
    seen = fit(accumulate_grad_batches=2, log_every_n_steps=2, max_steps=4)
    for step, took in seen["perf/step_ms"].items():
        assert took / 1000 == pytest.approx(2 * SECONDS)
        assert seen["perf/tokens_per_s"][step] * took / 1000 == pytest.approx(2 * 64)
    assert list(seen["perf/step_ms"]) == [2, 4]


def test_waiting_for_data_is_seen():
    quick, slow = fit(), fit(rows=Slow(tiny.rows("llama", 64)))
    assert quick["perf/loader_wait"][8] == 0
    assert slow["perf/loader_wait"][8] == pytest.approx(0.5)  # four rows a step take as long as the step
    assert slow["perf/step_ms"][8] == pytest.approx(2 * 1000 * SECONDS)


def test_it_can_be_off():
    assert not fit(callbacks=[Throughput(enabled=False)])


def test_utilisation_is_that_of_the_models_arithmetic(monkeypatch):
    monkeypatch.setattr(seam, "peak_flops", lambda *_: 1e9)
    seen = fit()
    flops = training_flops(tiny.module("llama"), tiny.batch("llama"))
    for step, mfu in seen["perf/mfu"].items():
        assert mfu == pytest.approx(flops * 4 / (seen["perf/step_ms"][step] / 1000) / 1e9)


@pytest.mark.parametrize("options", [{}, {"lean_loss": True}, {"activation_checkpointing": True}])
def test_arithmetic_of_a_llama(options):
    """6 N a token for the matrices, 12 layers width tokens for attention, whatever the method."""
    module, batch = tiny.configured("llama", "dsq", **options), tiny.batch("llama")
    before = torch.get_rng_state()
    measured = training_flops(module, batch)
    assert torch.equal(torch.get_rng_state(), before)
    plain = tiny.configured("llama", "fp").model
    matrices = sum(m.weight.numel() for m in plain.modules() if isinstance(m, torch.nn.Linear))
    tokens, layers, width = 16, 2, 32
    rotary = 6 * tokens * plain.config.head_dim // 2  # a product of matrices in transformers before 5.18
    extra = measured - (6 * matrices * tokens + 12 * layers * width * tokens**2)
    assert extra in (0, rotary)


def test_arithmetic_of_a_vit():
    module = tiny.configured("vit", "stableqat")
    tokens, layers, width, classes = 17, 2, 32, 10
    matrices = 12 * width**2 * layers
    patches, head = 16 * width * 4, width * classes
    expected = 6 * (matrices * tokens + patches + head) + 12 * layers * width * tokens**2
    assert training_flops(module, tiny.batch("vit")) == expected


PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA GH200 480GB": None,
    "Tesla T4": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_are_those_of_known_devices(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = partial(peak_flops, torch.device("cuda"))
    assert gpu("bf16-mixed") == PEAKS[name]
    assert gpu("32-true") is None
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None

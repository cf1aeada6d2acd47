"""What a QAT step of the demo's Llama costs beside its full-precision step, on this machine's CPU.

Whole training steps (forward, backward, clipping, AdamW) of the real training system inside a real
Trainer, the arms interleaved in one process, each ratio taken within a round; with and without the
quantizer monitor.

    python tests/benchmarks/step_cost.py [--rounds 5] [--steps 25] [--threads 1]
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from stableqat.callbacks import DivergenceGuard, QuantizerMonitor
from stableqat.modules import LlamaModule
from stableqat.quantizers import DSQ, STE, ParetoQ, StableQAT

BASE = Path(__file__).parents[2] / "configs" / "llama" / "base.yaml"
ARMS = {"FP": None, **{cls.__name__: partial(cls, bits=2) for cls in (STE, DSQ, ParetoQ, StableQAT)}}


class StepTimes(L.Callback):
    """Seconds from the start of one step to the start of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def median(self) -> float:
        times = [b - a for a, b in zip(self.starts[3:], self.starts[4:], strict=False)]
        return statistics.median(times)


def step_seconds(arm: str, config: dict[str, Any], batch: torch.Tensor, steps: int, monitor: bool) -> float:
    torch.manual_seed(0)
    module = LlamaModule(config=config, quantizer=ARMS[arm], optimizer=partial(torch.optim.AdamW, lr=1e-3))
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            gradient_clip_val=1.0,
            logger=TensorBoardLogger(folder),
            callbacks=[times, DivergenceGuard(), *([QuantizerMonitor()] if monitor else [])],
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        rows = [{"input_ids": batch, "labels": batch}] * steps
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
    return times.median()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1, help="threads of a run; the demo's runs have one")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)

    base = yaml.safe_load(BASE.read_text())
    config = base["model"]["init_args"]["config"]
    shape = (base["data"]["init_args"]["batch_size"], base["data"]["init_args"]["block_size"])
    batch = torch.randint(0, config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    machine = f"{platform.processor() or platform.machine()}, {options.threads} thread(s)"
    grid = f"batch {shape}, {options.rounds} rounds of {options.steps} steps"
    print(f"torch {torch.__version__}, {machine}, {grid}")
    for monitor in (False, True):
        ratios: dict[str, list[float]] = {arm: [] for arm in ARMS}
        baselines = []
        for _ in range(options.rounds):
            seconds = {arm: step_seconds(arm, config, batch, options.steps, monitor) for arm in ARMS}
            baselines.append(seconds["FP"])
            for arm in ARMS:
                ratios[arm].append(seconds[arm] / seconds["FP"])
        print(f"monitor {'on' if monitor else 'off'}: FP step {1e3 * statistics.median(baselines):.1f} ms")
        for arm, values in ratios.items():
            spread = f"{min(values):.3f}-{max(values):.3f}"
            print(f"  {arm:<10} {statistics.median(values):.3f} x FP  ({spread})")


if __name__ == "__main__":
    main()

"""A study as large as they get, made of formulas: 6 arms, 8 learning rates, 3 seeds, some diverged."""

import math
import random
from pathlib import Path
from typing import Any

from stableqat.analysis.arms import Result
from stableqat.analysis.comparison import Summary, summarize
from stableqat.events import Run

COMMON = {"bits": 2, "scale_init": "mse", "granularity": "channel", "max_steps": 400, "subcommand": "fit"}
ARMS: list[dict[str, Any]] = [
    {"method": "FP", "max_steps": 400, "subcommand": "fit"},
    {**COMMON, "method": "STE", "grid": "integer", "mask": "range"},
    {**COMMON, "method": "STE", "grid": "stretched", "mask": "range"},
    {**COMMON, "method": "DSQ", "grid": "integer", "mask": "range"},
    {**COMMON, "method": "ParetoQ", "grid": "stretched", "mask": "range"},
    {**COMMON, "method": "StableQAT", "grid": "integer", "mask": "range", "amplitude": 0.21, "harmonics": 1},
]
LRS = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]
PLAN = "compare: {baseline: {method: STE, grid: integer}, margin: 0.01}\n"


def summary_of(runs: list[Run], folder: Path = Path("demo")) -> Summary:
    """The comparison of runs that were not read from event files."""
    return summarize(folder, [Result.of(run) for run in runs])


def ended(losses: dict[str, dict[float, list[float]]], **settings: Any) -> list[Run]:
    """Runs by method and learning rate, with the final losses of seeds 0, 1, ...; nan diverged."""
    found = []
    for method, by_lr in losses.items():
        for lr, finals in by_lr.items():
            for seed, loss in enumerate(finals):
                hparams = COMMON | {"method": method, "lr": lr, "seed": seed} | settings
                scalars = {"val/loss": {400: loss}, "hp/initial_loss": {1: 8.0}, "hp/steps": {400: 400.0}}
                found.append(Run(Path("demo", f"{method}-lr{lr:g}-s{seed}"), hparams, scalars))
    return found


def references(ptq: float = 6.0) -> list[Run]:
    """Full precision, and rounding to nearest."""
    start = Run(Path("demo/start"), ARMS[0] | {"lr": 4e-3, "seed": 0}, {"val/loss": {400: 3.1}})
    rounded = COMMON | {"method": "STE", "subcommand": "validate", "seed": 0}
    return [start, Run(Path("demo/ptq"), rounded, {"val/loss": {0: ptq}})]


def runs(
    folder: Path, arms: list[dict[str, Any]] = ARMS, lrs: list[float] = LRS, seeds: int = 3, every: int = 10
) -> list[Run]:
    """Finished runs; they differ from arm to arm, and the largest learning rates end some of them."""
    validate = COMMON | {"grid": "integer", "mask": "range", "method": "STE", "subcommand": "validate"}
    found = [
        Run(folder / "start", arms[0] | {"lr": 4e-3, "seed": 0}, {"val/loss": {400: 3.1}}),
        Run(folder / "ptq-b2", validate | {"seed": 0}, {"val/loss": {0: 8.2}}),
    ]
    for number, arm in enumerate(arms):
        for lr in lrs:
            for seed in range(seeds):
                name = f"{arm['method'].lower()}-{number}-lr{lr:g}-s{seed}"
                scalars = series(number, lr, seed, every, arm["method"] != "FP")
                found.append(Run(folder / name, {**arm, "lr": lr, "seed": seed}, scalars))
    return found


def series(number: int, lr: float, seed: int, every: int, quantized: bool) -> dict[str, dict[int, float]]:
    noise = random.Random(f"{lr} {seed}")
    own = random.Random(f"{number} {lr} {seed}")
    excess = math.log10(lr / 3e-3)
    final = 3.3 + 0.25 * excess**2 + (0.1 + 0.02 * number) * max(0.0, excess) ** 2 + noise.gauss(0, 0.02)
    final += own.gauss(0, 0.004)
    diverges = excess > 1.2 and own.random() < 0.25 + 0.12 * number
    last = own.randrange(40, 300) if diverges else 400
    tags: dict[str, dict[int, float]] = {}

    def log(tag: str, step: int, value: float) -> None:
        tags.setdefault(tag, {})[step] = value

    for step in range(every, last + 1, every):
        left = math.exp(-step * (0.004 + lr) / 0.5)
        log("train/loss", step, final + (7.5 - final) * left + noise.gauss(0, 0.03) + diverges * step / last)
        log("train/grad_norm", step, (0.3 + 2 * left) * (1 + 30 * lr) * math.exp(own.gauss(0, 0.15)))
        if quantized:
            log("quant/flip_rate", step, 0.02 * lr**0.6 * (1 + 0.2 * number) * math.exp(own.gauss(0, 0.1)))
            log("quant/oscillation", step, 0.004 * lr**0.5 * (1 + 0.3 * number))
            log("quant/scale_drift", step, (1 - left) * (0.05 + lr) * (1 + 0.2 * number))
            log("quant/clipped", step, 0.15 + 0.05 * number + 0.1 * lr)
            log("layers/layers.0.q_proj/flip_rate", step, 0.01)
        if step % 100 == 0:
            log("val/loss", step, final + (7.5 - final) * left)
    for tag, shift in {"val/loss": 0.0, "val/loss_even": 0.003, "val/loss_odd": -0.003}.items():
        log(tag, last, math.nan if diverges else final + shift)
    for tag, value in {"initial_loss": 7.9, "diverged": float(diverges), "steps": float(last)}.items():
        log(f"hp/{tag}", last, value)
    return {tag: dict(sorted(points.items())) for tag, points in tags.items()}

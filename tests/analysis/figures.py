"""What the published event files say, by part of the study, in the words of the pages that report it."""

import json
import math
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from stableqat.analysis.arms import Result
from stableqat.analysis.comparison import ArmSummary, Summary, read_summaries
from stableqat.analysis.statistics import Paired, paired
from stableqat.bench.report import ratios
from stableqat.ops import Fourier
from stableqat.studies.study import short

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "lightning_logs" / "published"
PARTS = {
    "A": "study-2bit",
    "B": "study-2bit-seeds",
    "C": "study-3-4bit",
    "D": "study-controls",
    "SGD": "study-controls-sgd",
    "E": "study-mismatch",
    "F": "study-2bit-lr",
}
STE, DSQ, STABLE, FP = "STE", "DSQ", "StableQAT", "FP"
PARETOQ, STABLE_STRETCHED = "ParetoQ stretched", "StableQAT stretched"
SLOWER = "STE weight_lr_multiplier 0.75"
AMPLITUDES = {
    0.05: "StableQAT amplitude 5e-2",
    0.10: "StableQAT amplitude 0.1",
    0.15: "StableQAT amplitude 0.15",
    0.21: "StableQAT",
    0.22: "StableQAT amplitude 0.22",
}
HARMONICS = ("StableQAT", "StableQAT harmonics 2", "StableQAT harmonics 3")
NAMES = {
    "STE": STE,
    "DSQ": DSQ,
    "StableQAT": STABLE,
    "ParetoQ (STE, stretched)": PARETOQ,
    "StableQAT, stretched": STABLE_STRETCHED,
    "full precision, same tokens": FP,
}


@cache
def study(part: str) -> Summary:
    (comparison,) = read_summaries([PUBLISHED / PARTS[part]])
    return comparison


@cache
def arm(part: str, label: str) -> ArmSummary:
    (found,) = (each for each in study(part).arms if each.label == label)
    return found


def labels(part: str) -> list[str]:
    return [each.label for each in study(part).fits]


def count(*parts: str) -> int:
    return sum(len(each.runs) for part in parts for each in study(part).fits)


def losses(part: str, label: str, lr: float) -> dict[Any, float]:
    """By seed, uncapped."""
    return {run.hparams["seed"]: last(run) for run in arm(part, label).cells[lr].runs}


def last(run: Result) -> float:
    return run.last["val/loss"]


def loss(part: str, label: str, lr: float) -> float:
    return fmean(losses(part, label, lr).values())


def best(part: str, label: str) -> float:
    return min(loss(part, label, lr) for lr in study(part).lrs)


def minus(part: str, label: str, base: str, lr: float) -> Paired:
    ours, theirs = losses(part, label, lr), losses(part, base, lr)
    return paired([ours[seed] - theirs[seed] for seed in ours if seed in theirs], 0.01)


def difference(part: str, label: str, lr: float | None = None, quantity: str = "loss") -> Any:
    """A difference as `stableqat compare` tests it."""
    key = label, lr, quantity if lr else "lr sensitivity"
    (found,) = (each for each in study(part).differences if (each.arm, each.lr, each.quantity) == key)
    return found


def mean_of(sample: Any, form: str = "+.4f") -> str:
    return format(sample.mean, form)


def interval(sample: Any, digits: int = 4) -> str:
    return f"[{sample.low:+.{digits}f}, {sample.high:+.{digits}f}]"


def with_interval(sample: Any, digits: int = 4) -> str:
    return f"{sample.mean:+.{digits}f} {interval(sample, digits)}"


def spread(values: dict[Any, float], digits: int = 4) -> str:
    """Mean and half of its 95% interval over seeds."""
    sample = paired(list(values.values()), 0.0)
    assert sample.mean is not None
    assert sample.low is not None
    half = f"{sample.mean - sample.low:.{digits}f}".removeprefix("0")
    return f"{sample.mean:.{digits}f} +- {half}"


def sensitivity(part: str, label: str) -> dict[Any, float]:
    """By seed."""
    return arm(part, label).sensitivity.by_seed


def octaves(label: str) -> float:
    band = arm("A", label).sensitivity.band
    assert band is not None
    return band.octaves


def usable(label: str) -> str:
    band = arm("A", label).sensitivity.band
    assert band is not None
    return f"{'>= ' * band.open}{band.octaves:.2f}"


def share(amplitude: float, harmonics: int = 1) -> float:
    """mean(g) / rms(g) of StableQAT's surrogate for weights spread evenly over a bin."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 - 0.5
    g = Fourier("none", amplitude, harmonics).derivative(u)
    return float(g.mean() / g.square().mean().sqrt())


def where_ste_is_closer() -> float:
    """The normal noise, in scales, above which STE is closer to the smoothed slope than StableQAT."""
    u = (torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000 - 0.5

    def cosine(sigma: float, g: torch.Tensor) -> float:
        slope = torch.stack([torch.exp(-(((u - 0.5 - k) / sigma) ** 2) / 2) for k in range(-8, 9)]).sum(0)
        return float((g * slope).mean() / (g.square().mean() * slope.square().mean()).sqrt())

    stable, ste = Fourier("none").derivative(u), torch.ones_like(u)
    low, high = 0.1, 0.5
    for _ in range(20):
        middle = (low + high) / 2
        closer = cosine(middle, stable) > cosine(middle, ste)
        low, high = (middle, high) if closer else (low, middle)
    return low


def as_ste_at(lr: float) -> float:
    """The factor on the learning rate with which STE's curve in A has StableQAT's loss; the nearest to 1."""
    from scipy.interpolate import PchipInterpolator

    lrs = study("A").lrs
    curve = PchipInterpolator(np.log2(lrs), [loss("A", STE, each) for each in lrs])
    factors = [2**root / lr for root in curve.solve(loss("A", STABLE, lr), extrapolate=False)]
    return float(max(factor for factor in factors if factor < 1))


def dose() -> tuple[list[float], list[float]]:
    """Gains over STE at lr 8e-3 by amplitude: as STE's losses of A predict them, and as measured in D."""
    lrs = study("A").lrs
    curve = [loss("A", STE, lr) for lr in lrs]
    predicted = [
        loss("A", STE, 8e-3) - float(np.interp(np.log(8e-3 * share(amplitude)), np.log(lrs), curve))
        for amplitude in AMPLITUDES
    ]
    return predicted, [-mean(minus("D", label, STE, 8e-3)) for label in AMPLITUDES.values()]


def mean(sample: Any) -> float:
    assert sample.mean is not None
    return sample.mean


def cosine(label: str, start: bool) -> float:
    """Mean cosine in E: at the start, which both learning rates share, or later."""
    runs = [run for run in arm("E", label).runs if not start or run.hparams["lr"] == 1e-3]
    series = [run.scalars["quant/grad_cosine"] for run in runs]
    return fmean(value for each in series for step, value in each.items() if (step == min(each)) == start)


def flips_back(part: str, label: str, lr: float) -> float:
    """Percent of the codes, in a step, at the end."""
    return 100 * fmean(run.last["quant/oscillation"] for run in arm(part, label).cells[lr].runs)


def changes(label: str, lr: float) -> float:
    """Code changes a weight in a whole run of B."""
    runs = arm("B", label).cells[lr].runs
    return 240 * fmean(fmean(run.scalars["quant/flip_rate"].values()) for run in runs)


def norm(label: str) -> float:
    """Median of an arm's logged gradient norms in B."""
    return median(v for run in arm("B", label).runs for v in run.scalars["train/grad_norm"].values())


def pooled() -> Paired:
    """StableQAT minus STE at lr 1e-3, of all parts that have both at 2 bits under AdamW."""
    pairs = [(part, seed) for part in "ABDF" for seed in losses(part, STE, 1e-3)]
    return paired([losses(p, STABLE, 1e-3)[s] - losses(p, STE, 1e-3)[s] for p, s in pairs], 0.01)


def wide_row(name: str, label: str) -> str:
    """A row of the table of part A."""
    lrs = study("A").lrs
    means = {lr: loss("A", label, lr) for lr in lrs}
    lr = min(lrs, key=lambda each: means[each])
    band = arm("A", label).sensitivity.band
    assert band is not None
    ends = " to ".join(short(float(f"{end:.2g}")) for end in (band.low, band.high))
    edge, one_way = (" (lower edge)", " (upward)") if lr == lrs[0] else ("", "")
    cells = f"{means[1e-4]:.3f} | {means[3e-4]:.3f} | {short(lr)}{edge} | {means[lr]:.3f}"
    mean_sensitivity = fmean(sensitivity("A", label).values())
    return f"| {name} | {cells} | {ends} | {usable(label)} | {mean_sensitivity:.3f}{one_way} |"


def seeds_row(name: str, part: str, label: str, last: str) -> str:
    """A row of the table of part B."""
    cells = [*(losses(part, label, lr) for lr in study(part).lrs), sensitivity(part, label)]
    return f"| {name} | {' | '.join(map(spread, cells))} | {last}|"


def control(label: str, base: str) -> str:
    """Loss minus that of the plain arm, at lr 1e-3 and 8e-3."""
    return "; ".join(mean_of(minus("D", label, base, lr), "+.3f") for lr in (1e-3, 8e-3))


def problems(page: str, pieces: list[str]) -> list[str]:
    """Pieces that a page lacks, and digits of it that no piece covers."""
    covered = bytearray(len(page))
    missing = []
    for piece in pieces:
        places = [match.start() for match in re.finditer(re.escape(piece), page)]
        missing += [] if places else [f"not on the page: {piece}"]
        for place in places:
            covered[place : place + len(piece)] = b"x" * len(piece)
    numbers = (match.span() for match in re.finditer(r"\d+(?:[.,]\d+)*(?:e-?\d+)?", page))
    stray = [start for start, end in numbers if not all(covered[start:end])]
    return missing + [f"not accounted for: {page[max(0, i - 40) : i + 20]}" for i in stray]


def text_of(markdown: str) -> str:
    """The words of a page: one line, without blocks of code, pictures and the targets of links."""
    prose = re.sub(r"(?ms)^```.*?^```$|!\[[^]]*\]\([^)]*\)|<img[^>]*>|(?<=\])\([^)]*\)", " ", markdown)
    return " ".join(prose.replace("`", "").split())


def series(values: Iterable[float], form: str = ".3f") -> str:
    return ", ".join(format(value, form) for value in values)


def apart(names: Iterable[str]) -> str:
    """The largest difference between the losses of some arms of D at lr 1e-3, rounded up."""
    means = [loss("D", name, 1e-3) for name in names]
    return f"{math.ceil(1e3 * (max(means) - min(means))) / 1e3:.3f}"


def ptq(part: str, label: str) -> float:
    value = arm(part, label).ptq
    assert value is not None
    return value


def loss_at_3(label: str) -> float:
    """Mean loss of SGD's runs at learning rate 3 that were not ended, beyond the cap too."""
    return fmean(last(run) for run in arm("SGD", label).cells[3].runs if not run.diverged)


def time(name: str, key: str = "forward_backward_ms") -> float:
    return median(ratios(bench(), name, key))


def bench() -> dict[str, Any]:
    """Of Llama-3.2-1B on an H200, 4 x 2048 tokens."""
    return json.loads((PUBLISHED / "bench" / "llama-3.2-1b-4x2048.json").read_text())["modes"]["eager"]


def demo() -> str:
    return (PUBLISHED / "demo" / "compare.md").read_text()


def recovered() -> str:
    """Smallest and largest share of PTQ's loss that an arm of the demo wins back."""
    shares = [int(each) for each in re.findall(r"\| (\d+)%  +\| 0\.\d{4} ", demo())]
    return f"{min(shares)}-{max(shares)}%"


def demo_rows() -> list[str]:
    """Rows of the demo's table; they stand on compare's tables, because its runs are not published."""
    llama, vit = (
        {line.split("|")[1].strip(): line.split("|")[2:5] for line in part.splitlines() if line[:2] == "| "}
        for part in (each.split("### Training")[0] for each in demo().split("## demo-vit"))
    )
    rows = {
        "STE | integer": "STE",
        "DSQ | integer": "DSQ",
        "StableQAT | integer": "StableQAT",
        "ParetoQ, and STE on its grid (equal: the same method) | stretched": "ParetoQ stretched",
        "full precision for the same extra steps |": "FP",
    }
    assert llama["STE stretched"] == llama["ParetoQ stretched"]
    assert vit["STE stretched"] == vit["ParetoQ stretched"]

    def cells(values: list[str]) -> str:
        words = (each.strip() for each in values)
        return " / ".join(f"{float(each):.3f}" if each != "diverged" else each for each in words)

    return [
        *(f"| {name} | {cells(llama[arm])} | {cells(vit[arm])} |" for name, arm in rows.items()),
        "| lr 3e-4 / 1e-3 / 1e-2 | grid | Llama (FP 3.652) | ViT (FP 0.151) |",
        "| integer | 3.921 | 0.919 | | | stretched | 3.881 | 0.386 |",  # of all batches, in the picture alone
    ]

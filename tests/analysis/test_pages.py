"""The pages that report results say what the published event files hold."""

import math
import re

import pytest
from figures import (
    DSQ,
    FP,
    NAMES,
    PARETOQ,
    PARTS,
    PUBLISHED,
    ROOT,
    SLOWER,
    STABLE,
    STABLE_STRETCHED,
    STE,
    bench,
    count,
    difference,
    losses,
    mean,
    problems,
    sensitivity,
    spread,
    text_of,
    time,
    usable,
    with_interval,
)
from results_page import in_results, results

from stableqat.analysis.statistics import paired
from stableqat.bench.report import memory_ratio

METHODS = ("STE", "DSQ", "ParetoQ", "StableQAT")


def test_results():
    assert problems(results(), in_results()) == []


def readme() -> str:
    """What README.md reports: its first table, the demo's and that of the cost, with the text between."""
    page = (ROOT / "README.md").read_text()
    return text_of(
        "\n".join(
            page[page.index(first) : page.index(last)]
            for first, last in (
                ("At 2 bits, a Llama of", "## Two commands"),
                ("| demo, 2 bits,", "## Your own runs"),
                ("| Llama-3.2-1B, 4 x 2048", "![Time, memory and kernels beside full precision]("),
            )
        )
    )


def in_readme() -> list[str]:
    own = {
        label: with_interval(difference("B", label), 3) for label in NAMES.values() if label not in (STE, FP)
    }
    slower, base = sensitivity("F", SLOWER), sensitivity("F", STE)
    own |= {SLOWER: with_interval(paired([slower[seed] - base[seed] for seed in slower], 0.0), 3)}
    rows = {
        "STE": ("B", STE, "STE"),
        "DSQ": ("B", DSQ, "DSQ"),
        "StableQAT": ("B", STABLE, "StableQAT"),
        "ParetoQ (stretched grid)": ("B", PARETOQ, "ParetoQ"),
        "StableQAT, stretched grid": ("B", STABLE_STRETCHED, None),
        "control: STE, weights' lr x 0.75 (five other seeds)": ("F", SLOWER, None),
        "full precision, same tokens": ("B", FP, "FP"),
    }
    table = []
    for name, (part, label, method) in rows.items():
        cells = [spread(losses(part, label, 1e-3)), spread(losses(part, label, 8e-3), 3)]
        cells += [spread(sensitivity(part, label)), own.get(label, ""), usable(label) if part == "B" else ""]
        cost = [time(method, "step_ms"), memory_ratio(bench(), method)] if method else ["", ""]
        cells += ["1" if method == "FP" else f"{each:.2f}" if each else "" for each in cost]
        table.append(" ".join(f"| {' | '.join([name, *cells])} |".split()))
    near = [abs(mean(difference("B", label, 1e-3))) for label in (DSQ, STABLE)]
    recovered = [int(each) for each in re.findall(r"\| (\d+)%  +\| 0\.\d{4} ", demo())]
    shares = {
        "STE, DSQ, ParetoQ, StableQAT": METHODS,
        'released StableQAT, "efficient" layer': ["stableqat_efficient"],
        "torchao QAT": ["torchao"],
        "released ParetoQ": ["paretoq"],
        "released DSQ": ["stableqat_dsq"],
    }
    for name, arms in shares.items():
        times = sorted({f"{time(each):.2f}" for each in arms})
        (memory,) = {f"{memory_ratio(bench(), each):.2f}" for each in arms}
        table.append(f"| {name} | {'-'.join(times)} | {memory} |")
    return [
        *table,
        f"equal on one grid (within {math.ceil(1e3 * max(near)) / 1e3:.3f}) and the stretched grid is worth"
        f" {-mean(difference('B', PARETOQ, 1e-3)):.3f}.",
        f"against {count(*PARTS)} runs, controls",
        *demo_rows(),
        f"what rounding loses ({min(recovered)}-{max(recovered)}% here)",
        "At 2 bits, a Llama of 9.9 M parameters from one checkpoint,",
        "four learning rates from 1e-3, where every arm is best, the lower edge, to 1.6e-2, with 95% t"
        " intervals.",
        "learning rates within 0.05 nats of the best reach, of eight from 1e-4 on, two seeds. Speed of"
        " Llama-3.2-1B on"
        " an H200:",
        "| | loss at lr 1e-3 (nats) | at 8e-3 | lr sensitivity, upward",
        "| Llama-3.2-1B, 4 x 2048 tokens, forward + backward | time | peak memory |",
        "One seed, two CPU cores, torch 2.15,",
    ]


def demo() -> str:
    return (PUBLISHED / "demo" / "compare.md").read_text()


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
        "ParetoQ, and STE on its grid (the same numbers: the same method) | stretched": "ParetoQ stretched",
        "full precision for the same extra steps |": "FP",
    }
    assert llama["STE stretched"] == llama["ParetoQ stretched"]
    assert vit["STE stretched"] == vit["ParetoQ stretched"]

    def cells(values: list[str]) -> str:
        words = (each.strip() for each in values)
        return " / ".join(f"{float(each):.3f}" if each != "diverged" else each for each in words)

    return [
        *(f"| {name} | {cells(llama[arm])} | {cells(vit[arm])} |" for name, arm in rows.items()),
        "| demo, 2 bits, validation loss in nats, lr 3e-4 / 1e-3 / 1e-2 | grid | Llama (FP 3.554) | ViT"
        " (FP 0.151) |",
        "| integer | 3.884 | 0.511 | | | stretched | 3.786 | 0.386 |",  # of all batches, in the picture alone
    ]


def test_readme():
    assert problems(readme(), in_readme()) == []


@pytest.mark.parametrize(("page", "pieces"), [(results, in_results), (readme, in_readme)])
def test_a_changed_digit_is_noticed(page, pieces):
    """Every 40th digit; all of them take a minute."""
    text, pieces = page(), pieces()
    for match in list(re.finditer(r"\d", text))[::40]:
        changed = text[: match.start()] + str((int(match[0]) + 1) % 10) + text[match.end() :]
        assert problems(changed, pieces), text[match.start() - 30 : match.end()]

"""Table and picture come from the JSON alone."""

import json
from statistics import median

import pytest
from result import result
from rich.console import Console

from stableqat.analysis.style import look_of
from stableqat.bench.plot import draw
from stableqat.bench.report import copy_shares, markdown, memory_ratio, ratios, terminal


@pytest.fixture
def made():
    return json.loads(json.dumps(result()))


def row(text: str, block: str, arm: str) -> list[str]:
    """Cells of an arm's line in a block."""
    part = text.split(f"## {block}")[1].split("##")[0]
    (line,) = [line for line in part.splitlines() if line.startswith(f"| {arm} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_taken_within_a_round(made):
    eager = made["modes"]["eager"]
    assert ratios(eager, "torchao", "step_ms") == pytest.approx(
        [1.24257, 1.25, 1.25758, 1.25, 1.26530], rel=1e-5
    )
    assert ratios(eager, "broken", "step_ms") == []
    assert ratios(made["modes"]["graphed"], "STE", "step_ms") == []
    assert memory_ratio(eager, "STE") == 0.95
    assert memory_ratio(eager, "broken") is None


def test_shares_of_a_copy(made):
    assert copy_shares(made["kernels"], "backward", "DSQ") == pytest.approx([0.8] * 5)


def test_it_says_which_loss_was_measured(made):
    """Files from before do not tell."""
    made["settings"]["loss"] = "lean"
    assert markdown(made).startswith("# llama-3.2-1b, 4 x 2048 tokens, bf16-mixed, 4 bits, lean loss\n")


def test_the_table(made):
    text = markdown(made)
    assert text.startswith("# llama-3.2-1b, 4 x 2048 tokens, bf16-mixed, 4 bits\n")
    assert "- `stableqat bench --model llama-3.2-1b --batch 4`" in text
    assert "- NVIDIA H200, 2026-01-02" in text
    torchao = row(text, "Eager", "torchao")
    assert torchao[4:7] == ["187.50", "1.250 (1.243-1.265)", "200.00"]
    assert torchao[8:] == ["40,960", "36.00", "1.200", "14.80"]
    assert row(text, "Eager", "FP")[5] == "1.000"
    assert set(row(text, "Eager", "broken (failed)")[1:]) == {"-"}
    assert "- broken failed: RuntimeError: no such kernel" in text
    assert row(text, "Graphed", "STE")[2:4] == ["-", "-"]
    assert row(text, "Fake", "DSQ")[2:] == ["3.76", "0.940", "0.2097", "3.20", "0.800"]


def test_the_terminals_table_holds_the_same(made):
    console = Console(width=200, markup=False, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    for piece in terminal(made):
        console.print(piece)
    text = console.export_text()
    for word in ("1.250 (1.243-1.265)", "40,960", "no such kernel", "0.940", "Graphed"):
        assert word in text


def test_without_kernels_and_memory(made, tmp_path):
    for record in made["modes"]["eager"].values():
        record["peak_bytes"] = None
    made |= {"modes": {"eager": made["modes"]["eager"]}, "kernels": None}
    assert "Fake quantization" not in markdown(made)
    assert row(markdown(made), "Eager", "STE")[-3:] == ["-", "-", "14.80"]
    draw(made, tmp_path / "one")
    assert (tmp_path / "one").read_bytes().startswith(b"\x89PNG")


def test_the_picture(made, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    draw(made, tmp_path / "all")
    panels = {axes.get_title(): axes for axes in kept[0].axes if axes.get_visible()}
    modes = [f"{mode}: forward + backward" for mode in ("eager", "compiled", "graphed")]
    assert list(panels) == [*modes, "peak memory", "kernels alone"]
    lines = [line for line in panels[modes[0]].lines if line.get_marker() != "None"]
    dots = [line.get_xydata()[0] for line in lines]
    expected = [median(ratios(made["modes"]["eager"], arm, "step_ms")) for arm in ("STE", "DSQ", "torchao")]
    assert [x for x, _ in dots] == pytest.approx(expected)
    looks = [(line.get_color(), line.get_marker()) for line in lines]
    assert looks == [look_of(arm) for arm in ("STE", "DSQ", "torchao")]
    assert [text.get_text() for text in panels[modes[0]].texts] == ["failed"]
    left, right = panels["peak memory"].get_xlim()
    assert left < 0.95 < 1.2 < right

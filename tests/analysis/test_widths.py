"""Pictures over bits, of layers and of speed draw what was measured, and nothing where it was not."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from synthetic import COMMON, ended, references, summary_of

from stableqat.analysis import panels, widths
from stableqat.analysis.comparison import Summary
from stableqat.analysis.layers import layers
from stableqat.analysis.panels import Panel
from stableqat.analysis.style import LOOKS, styles_of
from stableqat.analysis.tables import markdown, write_page
from stableqat.events import Run
from stableqat.studies.record import Record

LOSSES = {"STE": {1e-3: [3.0, 3.2], 1e-2: [3.4, 3.4]}, "StableQAT": {1e-3: [2.9, 3.0], 1e-2: [2.8, 2.8]}}


def two_widths() -> Summary:
    better = {
        method: {lr: [x - 0.5 for x in losses] for lr, losses in by_lr.items()}
        for method, by_lr in LOSSES.items()
    }
    rounded = COMMON | {"method": "STE", "subcommand": "validate", "seed": 0, "bits": 4}
    ptq = Run(Path("demo/ptq4"), rounded, {"val/loss": {0: 4.0}})
    return summary_of([*references(), ptq, *ended(LOSSES), *ended(better, bits=4)])


def drawn(panel: Panel):
    axes = Figure().subplots()
    panel(axes)
    return axes


def test_loss_against_bits_joins_what_differs_in_bits_alone() -> None:
    summary = two_widths()
    (panel,) = widths.bits(summary, styles_of(summary.fits))
    axes = drawn(panel)
    lines = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert list(lines) == ["STE", "StableQAT", "PTQ", "FP (start)"]
    assert list(lines["STE"].get_ydata()) == pytest.approx([3.1, 2.6])
    assert list(lines["StableQAT"].get_ydata()) == pytest.approx([2.8, 2.3])
    assert list(lines["PTQ"].get_ydata()) == [6.0, 4.0]
    assert (lines["STE"].get_color(), lines["STE"].get_marker()) == LOOKS["STE"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "4"]


def sized(*widths: int) -> Summary:
    """Some widths with their sizes, and full precision."""
    size = {2: 3.0, 4: 5.0}
    runs = [Run(run.folder, run.hparams | {"deployed_mb": 12.0}, run.scalars) for run in references()[:1]]
    for bits in widths:
        losses = {
            m: {lr: [x - 0.5 * (bits == 4) for x in y] for lr, y in by_lr.items()}
            for m, by_lr in LOSSES.items()
        }
        runs += ended(losses, bits=bits, deployed_mb=size[bits])
        rounded = COMMON | {"method": "STE", "subcommand": "validate", "bits": bits}
        rounded |= {"deployed_mb": size[bits], "seed": 0}
        runs.append(Run(Path(f"demo/ptq{bits}"), rounded, {"val/loss": {0: 6.0 - 3.4 * (bits == 4)}}))
    return summary_of(runs)


def test_loss_against_size_has_a_front_of_what_nothing_smaller_beats() -> None:
    summary = sized(2, 4)
    (panel,) = widths.sizes(summary, styles_of(summary.fits))
    axes = drawn(panel)
    lines = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert list(lines) == ["STE", "StableQAT", "PTQ", "FP (start)", "Pareto front"]
    assert list(lines["StableQAT"].get_xdata()) == pytest.approx([3.0, 5.0], rel=0.01)
    assert list(lines["StableQAT"].get_ydata()) == pytest.approx([2.8, 2.3])
    assert list(lines["PTQ"].get_xdata()) == [3.0, 5.0]
    assert (list(lines["FP (start)"].get_xdata()), list(lines["FP (start)"].get_ydata())) == ([12.0], [3.1])
    # full precision is larger and worse here, and the front ends at its size
    front = zip(lines["Pareto front"].get_xdata(), lines["Pareto front"].get_ydata(), strict=True)
    assert [tuple(map(float, point)) for point in front] == [
        (3.0, pytest.approx(2.8)),
        (5.0, pytest.approx(2.3)),
        (12.0, pytest.approx(2.3)),
    ]
    axes.figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1  # beside the data


def test_sizes_are_a_column_and_tell_no_arms_apart() -> None:
    summary = sized(2, 4)
    found = {row["arm"]: row["deployed MB"] for row in summary.rows}
    assert found == {
        "FP (start)": 12.0,
        **{
            f"{name} {bits}-bit": size
            for name in ("PTQ", "STE", "StableQAT")
            for bits, size in ((2, 3.0), (4, 5.0))
        },
    }
    assert "| deployed MB |" in markdown(page := write_page(summary))
    assert "Deployed MB: the packed weights" in page.notes


def test_without_sizes_there_is_neither_picture_nor_column() -> None:
    assert widths.sizes(two_widths(), {}) == []
    assert "deployed MB" not in two_widths().rows[0]
    assert widths.sizes(sized(2), {}) == []  # one size


def test_a_map_shows_every_learning_rate_and_width() -> None:
    summary = two_widths()
    ste, stable = (drawn(panel) for panel in widths.maps(summary, {}))
    assert (ste.get_title(), stable.get_title()) == ("STE", "StableQAT")
    assert [text.get_text() for text in ste.texts] == ["3.100", "3.400", "2.600", "2.900"]
    bold = [text.get_text() for text in stable.texts if text.get_fontweight() == "bold"]
    assert bold == ["2.800", "2.300"]
    assert ste.images[0].get_clim() == stable.images[0].get_clim() == pytest.approx((2.3, 3.4))


def test_one_width_has_no_picture_over_bits() -> None:
    summary = summary_of(ended(LOSSES))
    assert widths.bits(summary, {}) == widths.maps(summary, {}) == []
    assert layers(summary, {}) == []
    assert panels.speed(summary, {}) == []


def test_speed_is_by_method(tmp_path: Path) -> None:
    runs = ended({"STE": {1e-3: [3.0, 3.0]}, "FP": {1e-3: [2.9]}})
    for run, rate in zip(runs, (100.0, 300.0, 500.0), strict=True):
        run.scalars["perf/tokens_per_s"] = {10: 1.0, 20: rate, 30: 1e4}
    runs = [Run(tmp_path / run.folder.name, run.hparams, run.scalars) for run in runs]
    runs[0].folder.mkdir()
    Record("done", {}, seconds=90.0).write(runs[0].folder)
    rate, minutes = (drawn(panel) for panel in panels.speed(summary_of(runs), {}))
    assert (rate.get_xlabel(), minutes.get_xlabel()) == ("tokens / s", "minutes per run")
    assert [bar.get_width() for bar in rate.patches] == [500.0, 200.0]
    assert [tick.get_text() for tick in rate.get_yticklabels()] == ["FP", "STE"]
    assert [bar.get_width() for bar in minutes.patches] == [1.5]


@pytest.mark.parametrize("prefix", ["layers", "quant"])  # the latter of earlier versions
def test_a_map_of_layers_has_a_row_per_arm_and_a_column_per_layer(
    monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    values = {"a.q_proj": (10.0, 0.1), "a.k_proj": (12.0, 0.3)}

    def read(folder: Path, tags: tuple[str, ...]) -> Run:
        scalars = {f"{prefix}/{layer}/snr_db": {10: 5.0, 20: snr} for layer, (snr, _) in values.items()}
        scalars |= {f"{prefix}/{layer}/flip_rate": {10: 0.1, 20: rate} for layer, (_, rate) in values.items()}
        scalars |= {"quant/snr_db": {10: 1.0}, f"{prefix}/a.q_proj/clipped": {10: 1.0}}
        return Run(folder, scalars={tag: each for tag, each in scalars.items() if tag.startswith(tags)})

    monkeypatch.setattr("stableqat.analysis.layers.read_run", read)
    snr, flips = (drawn(panel) for panel in layers(summary_of(ended(LOSSES)), {}))
    assert snr.images[0].get_array().tolist() == [[10.0, 12.0]] * 2
    assert flips.images[0].get_array().tolist() == [[pytest.approx(0.1), pytest.approx(0.2)]] * 2
    assert [tick.get_text() for tick in snr.get_xticklabels()] == ["q_proj", "k_proj"]
    assert [tick.get_text() for tick in snr.get_yticklabels()] == ["STE", "StableQAT"]

"""What a comparison says in words follows from its tests, and stops where they do."""

import json
import math
from pathlib import Path

from synthetic import ended, references, summary_of

from stableqat.analysis.conclusions import conclusions
from stableqat.analysis.notes import notes
from stableqat.analysis.tables import as_json, markdown, write_page
from stableqat.events import Run

LRS = (1e-3, 1e-2, 0.1)
STE = {lr: [loss + seed / 100 for seed in range(4)] for lr, loss in zip(LRS, (3.2, 3.0, 3.4), strict=True)}


def minus(shifts: dict[float, float], spread: float = 0.001) -> dict[float, list[float]]:
    """STE's losses, shifted at some learning rates, the seeds a little apart."""
    noise = (spread, -spread, spread / 2, -spread / 2)
    return {
        lr: [loss + shifts.get(lr, 0.0) + each for loss, each in zip(STE[lr], noise, strict=True)]
        for lr in STE
    }


def said(runs: list[Run], folder: Path, margin: float = 0.01) -> list[str]:
    (folder / "study.yaml").write_text(f"compare: {{margin: {margin}}}\n")
    return conclusions(summary_of(runs, folder))


def test_equivalent_arms(tmp_path: Path) -> None:
    runs = [*references(), *ended({"STE": STE, "DSQ": minus({}), "StableQAT": minus({1e-2: 0.001})})]
    assert said(runs, tmp_path) == [
        "Each at its best learning rate, no arm differs from STE by more than 0.003 nats (4 seeds, 95%"
        " intervals). At equal learning rates, no arm is shown to differ from STE by an amount that matters."
    ]


def test_one_better_arm(tmp_path: Path) -> None:
    """Better at its best learning rate and above it, worse below."""
    better = minus({1e-3: 0.05, 1e-2: -0.1, 0.1: -0.2})
    runs = [*references(), *ended({"STE": STE, "DSQ": minus({}), "StableQAT": better})]
    assert said(runs, tmp_path) == [
        "Each at its best learning rate, StableQAT has a lower loss than STE (by 0.1000 nats); DSQ differs"
        " from STE by at most 0.002 nats (4 seeds, p < 0.05 after Holm's correction, 95% intervals). At equal"
        " learning rates, the loss is lower than that of STE for StableQAT at 1e-2 and above; it is higher"
        " for StableQAT at 1e-3."
    ]
    (text,) = said(runs, tmp_path, margin=0.15)  # a difference that does not matter is no finding
    assert "no arm differs from STE by more than 0.102 nats" in text
    assert "lower than that of STE for StableQAT at 0.1." in text


def test_what_is_not_shown_is_not_said(tmp_path: Path) -> None:
    noisy = minus({1e-2: -0.1}, spread=0.3)
    assert said([*references(), *ended({"STE": STE, "DSQ": noisy})], tmp_path) == [
        "Each at its best learning rate, DSQ is neither shown to differ from STE nor to equal it (the"
        " difference may be up to 0.536 nats) (4 seeds, 95% intervals). At equal learning rates, no arm is"
        " shown to differ from STE by an amount that matters."
    ]


def test_two_seeds_bound_no_closer_than_the_margin(tmp_path: Path) -> None:
    """The 95% interval is wider than the 90% interval that shows equivalence."""
    two = {lr: losses[:2] for lr, losses in STE.items()}
    close = {lr: [losses[0] + 0.001, losses[1] + 0.0024] for lr, losses in STE.items()}
    (text,) = said([*references(), *ended({"STE": two, "DSQ": close})], tmp_path)
    assert "DSQ differs from STE by at most 0.01 nats (2 seeds, TOST at 5%)." in text


def test_one_seed(tmp_path: Path) -> None:
    one = {lr: losses[:1] for lr, losses in STE.items()}
    better = {lr: [losses[0] - 0.5] for lr, losses in STE.items()}
    assert said([*references(), *ended({"STE": one, "StableQAT": better})], tmp_path) == [
        "With one seed, nothing can be concluded about differences between arms. The lowest loss seen is"
        " 2.5000 nats, of StableQAT, and the highest 3.0000, of STE, each at its best learning rate."
    ]


def test_seeds_that_are_not_shared(tmp_path: Path) -> None:
    runs = ended({"STE": {1e-3: [3.0, 3.1]}, "DSQ": {1e-3: [3.0, 3.1]}, "StableQAT": {1e-3: [3.0]}})
    (text,) = said([*references(), *runs], tmp_path)
    assert text.startswith("At learning rate 1e-3, DSQ has the same losses as STE (2 seeds)")
    assert text.endswith(" Nothing can be concluded about StableQAT, for want of seeds to pair.")


def test_best_learning_rates_at_the_edge(tmp_path: Path) -> None:
    falling = {lr: [loss - lr for loss in losses] for lr, losses in zip(LRS, [STE[1e-2]] * 3, strict=True)}
    rising = {lr: [loss + lr for loss in losses] for lr, losses in zip(LRS, [STE[1e-2]] * 3, strict=True)}
    (text,) = said([*references(), *ended({"STE": rising, "DSQ": falling})], tmp_path)
    assert text.endswith(
        " The best learning rate of STE is the lowest of the grid, so a lower one may be better. The best"
        " learning rate of DSQ is the highest of the grid, so a higher one may be better."
    )
    (text,) = said([*references(), *ended({"STE": rising, "DSQ": rising})], tmp_path)
    assert "The best learning rate of every arm is the lowest of the grid" in text


def test_diverged_arms(tmp_path: Path) -> None:
    lost = {lr: [math.nan] * 4 for lr in LRS}
    some = STE | {0.1: [math.nan, 3.4, 3.4, math.nan]}
    runs = ended({"STE": STE, "DSQ": some, "StableQAT": lost})
    (text,) = said([*references(), *runs], tmp_path)
    assert text.startswith(
        "Each at its best learning rate, StableQAT has a higher loss than STE (by 2.9850 nats); DSQ has"
        " the same losses as STE (4 seeds, p < 0.05 after Holm's correction)."
    )
    assert (
        " 14 of 36 runs diverged (DSQ 2 of 12 and StableQAT 12 of 12); a diverged run counts as the" in text
    )
    assert text.endswith("Training did not lower the loss of StableQAT below that of rounding alone (PTQ).")
    for run in runs:
        del run.scalars["hp/initial_loss"]
    (text,) = said([*references()[:1], *runs], tmp_path)
    assert " 14 of 36 runs diverged (DSQ 2 of 12 and StableQAT 12 of 12); " in text


def test_missing_controls(tmp_path: Path) -> None:
    runs = ended({"STE": STE, "DSQ": minus({})})
    unknown = " How much of the cost of rounding training recovers is unknown: no run measures "
    assert said(runs, tmp_path)[0].endswith(
        f"{unknown}full precision or PTQ on the arms' own grid and scale."
    )
    assert said([*references()[:1], *runs], tmp_path)[0].endswith(
        f"{unknown}PTQ on the arms' own grid and scale."
    )
    runs = ended({"DSQ": STE, "StableQAT": minus({})})
    assert said([*references(), *runs], tmp_path) == [
        "No arm is the baseline (method STE), so no difference is tested. The losses seen, each at its"
        " best learning rate, are all 3.0150 nats."
    ]


def test_nothing_to_compare(tmp_path: Path) -> None:
    assert said(references(), tmp_path) == [
        "No quantized arm was trained, so there are no methods to compare."
    ]
    assert said([*references(), *ended({"STE": {1e-2: [3.0]}})], tmp_path) == [
        "There is one quantized arm, STE, and nothing to compare it with. Its loss at learning rate 1e-2 is"
        " 3.0000 nats."
    ]


def test_each_width_and_family_has_its_own_paragraph(tmp_path: Path) -> None:
    losses = {"STE": STE, "StableQAT": minus({1e-2: -0.1})}
    runs = [*ended(losses), *ended({"STE": STE, "StableQAT": minus({})}, bits=4)]
    images = ended({"STE": STE, "StableQAT": minus({1e-2: 0.1})}, patch=4)
    for run in images:
        run.scalars["val/top1"] = {400: 0.5}
    two, four, vit = sorted(said([*runs, *images], tmp_path), key=lambda text: ("images" in text, text[0]))
    assert two.startswith("2 bits: Each at its best learning rate, StableQAT")
    assert "has a lower loss than STE" in two
    assert four.startswith("4 bits: ")
    assert "StableQAT 4-bit differs from STE 4-bit by at most" in four
    assert vit.startswith("2 bits, images: ")
    assert "has a higher loss than STE" in vit


def test_long_lists_are_cut(tmp_path: Path) -> None:
    losses = {"STE": STE} | {f"M{i}": minus({1e-2: -0.1 - i / 100}) for i in range(6)}
    (text,) = said([*references(), *ended(losses)], tmp_path)
    assert "M5, M4, M3 and 3 more have a lower loss than STE (by 0.1000 to 0.1500 nats)" in text
    assert "for M0, M1, M2 and 3 more at 1e-2." in text


def test_marks_tie_as_the_tests_do(tmp_path: Path) -> None:
    """DSQ is not shown to be worse than StableQAT, STE is; a column of losses at the cap has no best."""
    losses = {"STE": STE, "DSQ": minus({1e-2: -0.099}), "StableQAT": minus({1e-2: -0.1})}
    losses = {arm: by_lr | {1.0: [math.nan] * 4} for arm, by_lr in losses.items()}
    (tmp_path / "study.yaml").write_text("compare: {margin: 0.01}\n")
    summary = summary_of([*references(), *ended(losses)], tmp_path)
    assert summary.best["lr 1e-2"] == summary.best["reported loss"] == {"DSQ", "StableQAT"}
    assert summary.best["lr 1e-3"] == {"STE", "DSQ", "StableQAT"}
    assert "lr 1" not in summary.best
    rows = [line.split(" | ") for line in markdown(write_page(summary)).splitlines() if "| " in line]
    place = next(row.index(cell) for row in rows for cell in row if cell.strip() == "lr 1e-2")
    marked = {row[0].strip("| "): row[place].startswith("**") for row in rows[:7]}
    assert {name for name, mark in marked.items() if mark} == {"DSQ", "StableQAT"}
    assert "Bold: of the quantized arms" in notes(summary)


def test_one_seed_marks_nothing() -> None:
    one = {lr: losses[:1] for lr, losses in STE.items()}
    summary = summary_of([*references(), *ended({"STE": one, "DSQ": one})])
    assert not any(summary.best.values())
    assert "**" not in markdown(write_page(summary))
    assert "Nothing is bold: " in notes(summary)


def test_a_page_begins_with_its_conclusions() -> None:
    page = write_page(summary_of([*references(), *ended({"STE": STE, "DSQ": STE})]))
    assert markdown(page).startswith(f"## demo\n\n{page.conclusions[0]}\n\n| arm")
    (study,) = json.loads(as_json([page]))["studies"]
    assert study["conclusions"] == page.conclusions

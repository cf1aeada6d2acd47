"""The notes under a comparison's tables: what has to be known to read them."""

from stableqat.analysis.arms import UNSET
from stableqat.analysis.comparison import Summary
from stableqat.analysis.sensitivity import TOLERANCE
from stableqat.analysis.stability import FEWEST, FLOOR, SIGMAS, WINDOW
from stableqat.analysis.statistics import LEVEL
from stableqat.studies.study import short


def notes(summary: Summary) -> str:
    """A paragraph on each subject of the tables."""
    if not summary.fits:
        return "Validation loss in nats."
    table, on, reported = summary.rows, summary.selected_on, summary.reported_on
    edges = [f"{row['arm']} ({short(row['selected lr'])}, {row['edge']})" for row in table if row.get("edge")]
    texts = [
        "Validation loss in nats, mean +- standard deviation (runs) over seeds."
        f" Learning rates: {', '.join(map(short, summary.lrs))}. {_about_caps(summary)}; a diverged run"
        f" counts as the cap.{_about_above(summary)}",
        "Selected lr: the smallest mean over seeds of min(loss, cap) on"
        + (
            f" {on}, the even validation batches; the reported loss is {reported}, of the odd ones, and so is"
            " the perplexity, its exp by seed. What is given by learning rate, LR sensitivity, worst loss and"
            " differences are of all batches."
            if on != reported
            else f" {on}; not all runs logged its two halves, so the loss of the same batches is reported"
            " and, as the best of several, flatters."
        ),
    ]
    lost = [arm for arm in summary.fits if arm.selected and arm.cells[arm.selected.lr].diverged]
    if lost and (names := [key for key in table[0] if key.startswith(("perplexity", "top-1"))]):
        text = f"{' and '.join(names)}: mean over seeds at the selected lr; - where one of them diverged."
        texts.append(text[0].upper() + text[1:])
    if edges:
        texts.append(
            f"At the edge of its learning rates, so the best may lie beyond: {', '.join(edges)}. At the lower"
            " edge LR sensitivity looks upward only: it says what larger learning rates cost."
        )
    texts.append(
        "LR sensitivity: mean over the learning rates of min(loss, cap) - best. Worst loss: the largest"
        " min(loss, cap). Both by seed, then averaged, from seeds with all learning rates. Usable octaves: of"
        f" the learning rates around the best with a loss at most {TOLERANCE:g} nats above it,"
        " read off a monotone cubic over log2(lr), by seed, then averaged; >= where the grid ends first."
        " Recovered: (PTQ - reported) / (PTQ - FP), PTQ on the arm's own grid and scale."
    )
    if any("spikes per 1000" in row or "grad norm median" in row for row in table):
        texts.append(
            f"Spikes per 1000 logged steps: a training loss above the median of the {WINDOW} before it by"
            f" more than {SIGMAS} robust standard deviations (1.4826 MAD) and {FLOOR} nats; the first"
            f" {FEWEST} are not judged. Gradient norms: before clipping, the logged steps of all runs pooled."
            " Flip rate: mean over training; oscillation, scale drift, gradient cosine: at its end; of the"
            " runs that did not diverge."
        )
    if any("deployed MB" in row for row in table):
        texts.append(
            "Deployed MB: the packed weights in millions of bytes, codes in their bits, scales and all that"
            " is not quantized in 16."
        )
    if len(summary.quantized) > 1:
        texts.append(_about_marks(summary))
    if summary.quantized:
        texts.append(_about_differences(summary))
    if summary.usual:
        settings = ", ".join(f"{key} {value}" for key, value in summary.usual.items() if value != UNSET)
        texts.append(f"Settings where an arm has them and its name does not say otherwise: {settings}.")
    return "\n\n".join(texts)


def _about_caps(summary: Summary) -> str:
    groups: dict[str, list[str]] = {}
    for group, cap in summary.caps.items():
        groups.setdefault(f"{cap.loss:.4g} ({cap.source})", []).append(group.name)
    if len(groups) == 1:
        return f"Cap: {next(iter(groups))}"
    return "Caps: " + ", ".join(f"{cap} at {' and '.join(names)}" for cap, names in groups.items())


def _about_above(summary: Summary) -> str:
    above = sum(cell.above for arm in summary.fits for cell in arm.cells.values())
    what = "the selection, LR sensitivity, worst loss and differences"
    return f" Runs that ended above it, which count as it in {what}: {above}." if above else ""


def _about_marks(summary: Summary) -> str:
    if not any(summary.best.values()):
        return (
            "Nothing is bold: to tell the best from the rest takes two seeds or more of two quantized arms."
        )
    return (
        "Bold: of the quantized arms of one bit width with two seeds or more, the best of a column and all"
        " that are not shown to be worse, paired by seed and tested as differences are, with Holm's"
        " correction within the column."
    )


def _about_differences(summary: Summary) -> str:
    found, margin = summary.differences, summary.plan.margin
    if not found:
        return "Differences: none, because no baseline has another quantized arm of its bit width beside it."
    if all(each.n < 2 for each in found):
        return "Differences: not tested, because that takes two seeds or more that both arms ran with."
    sizes = {q: sum(e.quantity == q and e.p is not None for e in found) for q in (e.quantity for e in found)}
    names = ", ".join(dict.fromkeys(each.baseline for each in found))
    tests = ", ".join(f"{quantity}: {number}" for quantity, number in sizes.items())
    text = (
        f"Differences: arm minus baseline ({names}), paired by seed, losses up to the cap; 95%"
        " t intervals and two-sided paired t tests. The reported loss compares each arm at its selected lr."
        " Holm's correction within a family: all quantized"
        " arms and learning rates of the study for the loss, all quantized"
        f" arms for each of the others (tests: {tests})."
        f" Equivalent: the 90% interval lies within +-{margin:g} nats (TOST at {LEVEL:.0%})"
        + ("" if margin else ", the study names no margin")
        + f"; lower, higher: otherwise, where Holm's p is below {LEVEL:g}. Identical: every pair is the same"
        " number, as where both sides compute the same; capped: that number is the cap. Neither is tested or"
        " counts in a family. Intervals cover what seeds vary: where all runs begin from one checkpoint, the"
        " order of its data, and no other checkpoint, corpus or size."
    )
    unpaired = sum(each.unpaired for each in found if each.quantity == "loss")
    return text + (
        f" Runs left out of pairs because the other side lacks them: {unpaired}." if unpaired else ""
    )

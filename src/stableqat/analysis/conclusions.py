"""What a comparison says in plain English, and no more than its tests allow.

A paragraph for each group of quantized arms (bit width and family): how the arms compare with the baseline at
their best learning rates, then at equal ones, then what limits this: a best learning rate at the edge of the
grid, runs that diverged or are capped, controls that are missing. The words follow from the verdicts of
`differences`. Without two shared seeds there is no verdict, so the paragraph says what was seen, and that it
shows nothing.
"""

import math
from collections.abc import Sequence
from operator import attrgetter

from stableqat.analysis.arms import Group
from stableqat.analysis.comparison import ArmSummary, Summary
from stableqat.analysis.differences import Difference
from stableqat.studies.study import short

MOST_NAMED, MOST_RANGES = 3, 4
INTERVALS = "95% intervals"


def conclusions(summary: Summary) -> list[str]:
    """A paragraph for each group of quantized arms, in the order of the tables."""
    groups = dict.fromkeys(arm.group for arm in summary.quantized)
    if not groups:
        return ["No quantized arm was trained, so there are no methods to compare."]
    texts = {group: " ".join(filter(None, _sentences(summary, group))) for group in groups}
    if len(groups) == 1:
        return list(texts.values())
    return [f"{group.name[0].upper()}{group.name[1:]}: {text}" for group, text in texts.items()]


def _sentences(summary: Summary, group: Group) -> list[str]:
    arms = [arm for arm in summary.quantized if arm.group == group]
    labels = {arm.label for arm in arms}
    found = [each for each in summary.differences if each.arm in labels]
    tested = [each for each in found if each.n > 1 and each.verdict != "-"]
    only = f"at learning rate {short(summary.lrs[0])}" if len(summary.lrs) == 1 else ""
    seen = _seen(arms, only or "each at its best learning rate")
    if len(arms) == 1:
        first = [f"There is one quantized arm, {arms[0].label}, and nothing to compare it with.", seen]
    elif not found:
        wanted = summary.plan.baseline or {"method": "STE"}
        name = ", ".join(f"{key} {short(value)}" for key, value in wanted.items())
        first = [f"No arm is the baseline ({name}), so no difference is tested.", seen]
    elif not tested:
        seeds = {run.hparams.get("seed") for arm in arms for run in arm.runs}
        why = (
            "With one seed"
            if len(seeds) == 1
            else f"With fewer than two seeds shared with {found[0].baseline}"
        )
        why = "Without a cap for runs that diverged" if any(each.n > 1 for each in found) else why
        first = [f"{why}, nothing can be concluded about differences between arms.", seen]
    else:
        at = only[:1].upper() + only[1:] or "Each at its best learning rate"
        first = [_at_best(tested, summary.plan.margin, at), _at_equal(tested, summary.plan.margin)]
        known = {tested[0].baseline, *(each.arm for each in tested)}
        if others := [arm.label for arm in arms if arm.label not in known]:
            first.append(f"Nothing can be concluded about {_named(others)}, for want of seeds to pair.")
    return [*first, _edges(arms), _divergence(summary, arms), _controls(summary, arms)]


def _seen(arms: Sequence[ArmSummary], at: str) -> str:
    """The lowest and the highest loss, as numbers only."""
    losses = {arm.label: f"{arm.selected.loss:.4f}" for arm in arms if arm.selected}
    known = {label: loss for label, loss in losses.items() if math.isfinite(float(loss))}
    if not known:
        return ""
    lowest, highest = min(known.values(), key=float), max(known.values(), key=float)
    least, most = (_named([label for label in known if known[label] == loss]) for loss in (lowest, highest))
    if len(arms) == 1:
        return f"Its loss {at.removeprefix('each ')} is {lowest} nats."
    if lowest == highest:
        return f"The losses seen, {at}, are all {lowest} nats."
    return f"The lowest loss seen is {lowest} nats, of {least}, and the highest {highest}, of {most}, {at}."


def _at_best(tested: Sequence[Difference], margin: float, at: str) -> str:
    """How arms compare with the baseline, each at its best learning rate."""
    found = [each for each in tested if each.quantity == "reported loss"]
    if not found:
        return ""
    baseline = found[0].baseline
    by_verdict: dict[str, list[Difference]] = {}
    for each in sorted(found, key=lambda each: -abs(each.mean or 0.0)):
        word = {"identical": "equivalent"}.get(each.verdict, each.verdict)
        by_verdict.setdefault(word, []).append(each)
    clauses, grounds = [], [_seeds(found)]
    for word in ("lower", "higher"):
        if differ := by_verdict.get(word):
            by = [f"{abs(each.mean or 0.0):.4f}" for each in differ]
            sizes = f"{by[-1]} to {by[0]}" if len(by) > MOST_NAMED else _listed(by)
            clauses.append(f"{_arms(differ, 'has')} a {word} loss than {baseline} (by {sizes} nats)")
    if clauses:
        grounds.append("p < 0.05 after Holm's correction")
    alike = by_verdict.get("equivalent", [])
    if alike and all(each.verdict == "identical" for each in alike):
        clauses.append(f"{_arms(alike, 'has')} the same losses as {baseline}")
    elif alike:
        within, ground = _within(alike, margin)
        grounds.append(ground)
        if len(alike) == len(found) > 1:
            clauses.append(f"no arm differs from {baseline} by more than {within} nats")
        else:
            clauses.append(f"{_arms(alike, 'differs')} from {baseline} by at most {within} nats")
    if unclear := by_verdict.get("inconclusive"):
        grounds.append(INTERVALS)
        clauses.append(
            f"{_arms(unclear, 'is')} neither shown to differ from {baseline} nor to equal it (the difference"
            f" may be up to {_reach(unclear)} nats)"
        )
    if capped := by_verdict.get("capped"):
        clauses.append(f"{_arms(capped, 'is')} at the cap, as {baseline} is")
    return f"{at}, {'; '.join(clauses)} ({', '.join(dict.fromkeys(grounds))})."


def _at_equal(tested: Sequence[Difference], margin: float) -> str:
    """Where an arm differs from the baseline at the same learning rate."""
    found = [each for each in tested if each.quantity == "loss"]
    if len({each.lr for each in found}) < 2:
        return ""
    baseline = found[0].baseline
    clauses: list[str] = []
    for word in ("lower", "higher"):
        places: dict[str, list[str]] = {}
        for arm in dict.fromkeys(each.arm for each in found):
            own = {each.lr: each.verdict == word for each in found if each.arm == arm and each.lr is not None}
            if any(own.values()):
                places.setdefault(_where(own), []).append(arm)
        parts = [f"for {_named(arms)} {where}" for where, arms in places.items()]
        if len(parts) > MOST_RANGES:
            arms = [arm for each in places.values() for arm in each]
            parts = [f"for {_named(arms)} at one of them or more"]
        if parts:
            than = "it is" if clauses else "the loss is"
            than += f" {word}" + f" than that of {baseline}" * (not clauses)
            clauses.append(f"{than} {_listed(parts)}")
    if not clauses:
        enough = " by an amount that matters" if margin else ""
        return f"At equal learning rates, no arm is shown to differ from {baseline}{enough}."
    return f"At equal learning rates, {'; '.join(clauses)}."


def _where(holds: dict[float, bool]) -> str:
    """The learning rates, of those that are compared, at which something holds."""
    lrs = sorted(holds)
    true = [lr for lr in lrs if holds[lr]]
    if len(true) == len(lrs):
        return "at all of them"
    if len(true) > 1 and true == lrs[-len(true) :]:
        return f"at {short(true[0])} and above"
    if len(true) > 1 and true == lrs[: len(true)]:
        return f"at {short(true[-1])} and below"
    if len(true) > MOST_NAMED:
        return f"at {len(true)} of {len(lrs)}"
    return f"at {_listed([short(lr) for lr in true])}"


def _edges(arms: Sequence[ArmSummary]) -> str:
    """Which best learning rates lie at the edge of the arm's grid."""
    texts = []
    for edge, end, beyond in (("lower", "lowest", "lower"), ("upper", "highest", "higher")):
        at = [arm.label for arm in arms if arm.selected and arm.selected.edge == edge]
        if at:
            who = _named(at) if len(at) <= MOST_NAMED else f"{len(at)} of {len(arms)} arms"
            who = "every arm" if len(at) == len(arms) > 1 else who
            texts.append(
                f"The best learning rate of {who} is the {end} of the grid, so a {beyond} one may be better."
            )
    return " ".join(texts)


def _divergence(summary: Summary, arms: Sequence[ArmSummary]) -> str:
    """How many runs diverged or ended above the cap, and whose."""
    cap = summary.caps[arms[0].group].loss
    counts = (
        f"a diverged run counts as the cap, {cap:.4g} nats" if math.isfinite(cap) else "nothing caps them"
    )
    texts = []
    for happened, then, number in (
        ("diverged", counts, attrgetter("diverged")),
        ("ended above the cap", f"tests count them as the cap, {cap:.4g} nats", attrgetter("above")),
    ):
        of = {arm.label: sum(map(number, arm.cells.values())) for arm in arms}
        if any(of.values()):
            who = _named([f"{arm.label} {of[arm.label]} of {len(arm.runs)}" for arm in arms if of[arm.label]])
            total = sum(len(arm.runs) for arm in arms)
            texts.append(f"{sum(of.values())} of {total} runs {happened} ({who}); {then}.")
    return " ".join(texts)


def _controls(summary: Summary, arms: Sequence[ArmSummary]) -> str:
    """What the study does not measure, and arms that training did not help."""
    texts = []
    images = arms[0].images
    missing = []
    if not any(arm.kind == "fp" and arm.images == images for arm in summary.arms):
        missing.append("full precision")
    if all(arm.ptq is None for arm in arms):
        missing.append("PTQ on the arms' own grid and scale")
    if missing:
        texts.append(
            "How much of the cost of rounding training recovers is unknown: no run measures"
            f" {' or '.join(missing)}."
        )
    worse = [
        arm.label
        for arm in arms
        if arm.selected and arm.ptq is not None and arm.cells[arm.selected.lr].mean >= arm.ptq
    ]
    if worse:
        texts.append(
            f"Training did not lower the loss of {_named(worse)} below that of rounding alone (PTQ)."
        )
    return " ".join(texts)


def _seeds(found: Sequence[Difference]) -> str:
    """The number of pairs that verdicts rest on."""
    fewest, most = min(each.n for each in found), max(each.n for each in found)
    return f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"


def _within(found: Sequence[Difference], margin: float) -> tuple[str, str]:
    """What differences that are equivalent to none are at most, and on what ground."""
    reach = _reach(found)
    return (reach, INTERVALS) if float(reach) <= margin or not margin else (f"{margin:g}", "TOST at 5%")


def _reach(found: Sequence[Difference]) -> str:
    """The largest difference, of either sign, within the 95% intervals, rounded up."""
    ends = [abs(end) for each in found for end in (each.low, each.high) if end is not None]
    return f"{math.ceil(round(1000 * max(ends, default=0.0), 6)) / 1000:.3f}"


def _arms(found: Sequence[Difference], verb: str) -> str:
    """Some arms and what they do."""
    plural = {"has": "have", "is": "are", "differs": "differ"}
    return f"{_named([each.arm for each in found])} {verb if len(found) == 1 else plural[verb]}"


def _named(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = len(names) - MOST_NAMED
    return _listed([*names[:MOST_NAMED], f"{more} more"] if more > 1 else names)


def _listed(texts: Sequence[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} and {last}" if most else last

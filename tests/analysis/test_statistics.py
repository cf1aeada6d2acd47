"""Intervals and tests against figures worked out by hand and against scipy, and a study's use of them."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from synthetic import summary_of

from stableqat.analysis.arms import Result
from stableqat.analysis.comparison import Summary
from stableqat.analysis.differences import QUANTITIES, Difference
from stableqat.analysis.notes import notes
from stableqat.analysis.stability import quantile, spikes, stability
from stableqat.analysis.statistics import Paired, holm, paired, verdict
from stableqat.analysis.tables import as_json, markdown, write_page
from stableqat.errors import UserError
from stableqat.events import Run

COMMON = {"bits": 2, "grid": "integer", "mask": "range", "max_steps": 10, "subcommand": "fit"}
STE, STABLE = COMMON | {"method": "STE"}, COMMON | {"method": "StableQAT", "amplitude": 0.21}
PARETOQ = COMMON | {"method": "ParetoQ"}
FP = {"method": "FP", "max_steps": 10, "subcommand": "fit"}
LRS = (1e-3, 1e-2)


def test_an_interval_by_hand() -> None:
    """1, 2, 3: mean 2, standard error 1/sqrt(3), and the 97.5% point of t with 2 degrees is 4.30265."""
    sample = paired([1.0, 2.0, 3.0], margin=0.5)
    assert (sample.n, sample.mean) == (3, 2.0)
    half = 4.302652729911275 / math.sqrt(3)
    assert (sample.low, sample.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    # With 2 degrees of freedom the distribution function is 1/2 + t / (2 sqrt(2 + t^2)).
    t = 2 * math.sqrt(3)
    assert sample.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


@pytest.mark.parametrize("n", [2, 3, 8])
def test_scipy_says_the_same(n: int) -> None:
    draw = random.Random(n)
    ours, theirs = ([draw.gauss(mean, 0.1) for _ in range(n)] for mean in (3.0, 3.05))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    sample = paired(differences, margin=0.2)
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert sample.p == pytest.approx(test.pvalue, rel=1e-9)
    assert (sample.low, sample.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    one_sided = [
        stats.ttest_1samp(differences, -0.2, alternative="greater").pvalue,
        stats.ttest_1samp(differences, 0.2, alternative="less").pvalue,
    ]
    assert sample.p_equivalence == pytest.approx(max(one_sided), rel=1e-9)
    narrow = test.confidence_interval(0.90)
    assert (sample.p_equivalence < 0.05) == (narrow.low > -0.2 and narrow.high < 0.2)


def test_equivalent_arms_and_those_that_just_are_not() -> None:
    """Mean 0.004 and standard error 0.001: with 3 degrees the 90% interval reaches 0.004 + 2.353 * 0.001."""
    differences = [0.004 + 0.001 * math.sqrt(3) * sign for sign in (1, 1, -1, -1)]
    reach = 0.004 + 2.3533634348 * 0.001
    assert paired(differences, reach + 1e-6).p_equivalence < 0.05  # type: ignore[operator]
    assert paired(differences, reach - 1e-6).p_equivalence > 0.05  # type: ignore[operator]


def test_differences_without_variance() -> None:
    assert paired([0.0, 0.0, 0.0], 0.01) == Paired(3, 0.0, 0.0, 0.0, 1.0, 0.0)
    assert paired([0.0, 0.0], 0.0).p_equivalence == 0.0  # exactly equal, so equivalent at any margin
    assert paired([0.25, 0.25], 0.01) == Paired(2, 0.25, 0.25, 0.25, 0.0, 1.0)


def test_too_few_differences() -> None:
    assert paired([], 0.01) == Paired(0)
    assert paired([0.5], 0.01) == Paired(1, 0.5)
    assert paired([0.5, math.nan], 0.01) == paired([0.5, math.inf], 0.01) == Paired(2)


def test_holm_by_hand() -> None:
    """Ordered .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, and the last may not fall below .06."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("mean", "p_holm", "p_equivalence", "word"),
    [
        (-0.1, 0.04, 0.9, "lower"),
        (0.1, 0.04, 0.9, "higher"),
        (-0.1, 0.05, 0.9, "inconclusive"),
        (-0.001, 0.04, 0.01, "equivalent"),  # sure of its sign, but within what does not matter
        (0.0, 1.0, 0.0, "equivalent"),
        (0.1, None, None, "-"),
    ],
)
def test_verdicts(mean: float, p_holm: float | None, p_equivalence: float | None, word: str) -> None:
    assert verdict(mean, p_holm, p_equivalence) == word


def test_spikes() -> None:
    flat = [3.0 + 0.01 * (i % 3) for i in range(60)]  # median 3.01, MAD 0.01: 7 sigma are 0.104
    assert spikes(flat) == (0, 50)
    assert spikes([*flat, 3.5, 3.0]) == (1, 52)
    assert spikes([*flat, 3.115]) == (1, 51)
    assert spikes([*flat, 3.113]) == (0, 51)
    assert spikes([3.0] * 60 + [3.09]) == (0, 51)  # infinitely many sigmas, but below the floor
    assert spikes([*flat, 3.5, 3.6, 3.5]) == (3, 53)  # one does not hide the next
    assert spikes([*flat, math.inf, math.nan, 2.0]) == (0, 51)
    assert spikes([5.0, 9.0, 3.0]) == (0, 0)
    assert spikes([8.0 - 0.1 * i for i in range(60)]) == (0, 50)  # falling is not spiking
    assert spikes([8.0] * 99 + [*flat, 3.5]) == (1, 150)  # what lies further back does not count


def test_quantiles_are_values_that_were_logged() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [quantile(values[::-1], share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert quantile([7.0], 0.99) == 7.0
    assert quantile([1.0, 2.0, math.inf, math.nan], 0.99) == 2.0
    assert quantile([], 0.5) is None


def test_stability_of_runs() -> None:
    def run(losses: list[float], norms: list[float], flips: list[float]) -> Result:
        tags = {"train/loss": losses, "train/grad_norm": norms, "quant/flip_rate": flips}
        tags |= {"quant/oscillation": flips}
        tags |= {"hp/diverged": [float(losses[-2] > 3)]}
        return Result.of(Run(Path("r"), {}, {tag: dict(enumerate(values)) for tag, values in tags.items()}))

    calm = run([3.0] * 20, [1.0] * 9, [0.5, 0.25])
    wild = run([3.0] * 18 + [4.0, 3.0], [100.0], [0.75, 0.75])
    figures = stability([calm, wild])
    assert figures == {
        "spikes per 1000": 1000 * 1 / 20,
        "grad norm median": 1.0,
        "grad norm 95%": 100.0,
        "grad norm 99%": 100.0,
        "flip rate": 0.375,
        "oscillation": 0.25,
    }
    assert stability([Result.of(Run(Path("r")))]) == {}


def runs(losses: dict[tuple[str, float, int], float | None], arms: dict[str, dict[str, Any]]) -> list[Run]:
    """Runs with a final loss each; None diverged. Their cap is 4 unless one of them ends above it."""
    made = []
    for (name, lr, seed), loss in losses.items():
        series = {"hp/initial_loss": {1: 4.0}, "hp/diverged": {10: float(loss is None)}}
        series |= {} if loss is None else {"val/loss": {10: loss}}
        made.append(Run(Path("demo", f"{name}-{lr}-{seed}"), arms[name] | {"lr": lr, "seed": seed}, series))
    return made


def by_key(comparison: Summary) -> dict[tuple[str, str, float | None], Difference]:
    return {(each.arm, each.quantity, each.lr): each for each in comparison.differences}


def test_differences_of_a_study(tmp_path: Path) -> None:
    """A/A arms, an arm that is better at the large learning rate only, a diverged and a missing run."""
    ste = {0: (3.0, 3.5), 1: (3.1, 3.75), 2: (2.9, 3.25)}
    losses: dict[tuple[str, float, int], float | None] = {}
    for seed, pair in ste.items():
        for lr, loss in zip(LRS, pair, strict=True):
            losses["ste", lr, seed] = losses["aa", lr, seed] = loss
            losses["fp", lr, seed] = 1.0
    for seed, loss in ((0, 3.0), (1, None), (2, 5.0)):
        losses["stable", 1e-2, seed] = loss
    losses |= {("stable", 1e-3, 0): 3.125, ("stable", 1e-3, 1): 3.0}
    (tmp_path / "study.yaml").write_text("compare: {baseline: {method: STE}, margin: 0.01}\n")
    found = runs(losses, {"ste": STE, "aa": PARETOQ, "stable": STABLE, "fp": FP})
    comparison = summary_of(found, tmp_path)
    differences = by_key(comparison)
    assert {each.baseline for each in comparison.differences} == {"STE"}
    assert {each.arm for each in comparison.differences} == {"ParetoQ", "StableQAT"}
    assert len(comparison.differences) == 10

    for quantity, lr in (("loss", 1e-3), ("loss", 1e-2), *((each, None) for each in QUANTITIES[1:])):
        same = differences["ParetoQ", quantity, lr]
        assert (same.n, same.mean, same.low, same.high) == (3, 0.0, 0.0, 0.0)
        assert (same.p, same.p_holm, same.verdict) == (None, None, "identical")

    large = differences["StableQAT", "loss", 1e-2]  # diverged counts as what ended at 5
    expected = stats.ttest_1samp([3.0 - 3.5, 5 - 3.75, 5 - 3.25], 0)
    assert (large.n, large.unpaired, large.verdict) == (3, 0, "inconclusive")
    assert large.mean == pytest.approx(2.5 / 3)
    assert large.p == pytest.approx(expected.pvalue)
    assert large.p_holm == pytest.approx(2 * expected.pvalue)
    small = differences["StableQAT", "loss", 1e-3]
    assert (small.n, small.unpaired) == (2, 1)
    assert small.mean == pytest.approx((0.125 - 0.1) / 2)
    whole = differences["StableQAT", "lr sensitivity", None]  # the third seed has one learning rate only
    assert (whole.n, whole.unpaired) == (2, 1)
    ours = ((3.125 + 3.0) / 2 - 3.0, (3.0 + 5.0) / 2 - 3.0)
    theirs = ((3.0 + 3.5) / 2 - 3.0, (3.1 + 3.75) / 2 - 3.1)
    assert whole.mean == pytest.approx((ours[0] + ours[1] - theirs[0] - theirs[1]) / 2)

    text = notes(comparison)
    assert "(tests: loss: 2, reported loss: 1, lr sensitivity: 1, worst loss: 1)" in text
    assert "within +-0.01 nats" in text
    assert "Runs left out of pairs because the other side lacks them: 1." in text
    table = write_page(comparison).tables[-1]
    lines = table.lines
    assert table.title == "Differences from STE"
    assert lines[0] == ["arm", "of", "pairs", "difference", "95% interval", "p", "p (Holm)", "verdict"]
    line = ["ParetoQ", "loss at 1e-3", "3", "+0.0000", "[+0.0000, +0.0000]", "-", "-", "identical"]
    assert lines[1] == line
    assert "### Differences from STE\n" in markdown(write_page(comparison))

    (study,) = json.loads(as_json([write_page(comparison)]), parse_constant=pytest.fail)["studies"]
    assert study["differences"][0]["verdict"] == "identical"
    assert (study["baseline"], study["margin"], study["lrs"]) == ({"method": "STE"}, 0.01, list(LRS))
    (arm,) = (arm for arm in study["arms"] if arm["arm"] == "StableQAT")
    assert arm["hparams"]["amplitude"] == 0.21
    assert arm["cells"][1]["capped"] == {"0": 3.0, "1": math.nextafter(5, 6), "2": 5.0}
    assert [run["diverged"] for run in arm["runs"]] == [False, True, False, False, False]
    assert arm["runs"][0]["last"]["val/loss"] == 3.0


def test_holm_reaches_over_arms_and_learning_rates() -> None:
    draw = random.Random(1)
    losses: dict[tuple[str, float, int], float | None] = {}
    for lr in LRS:
        for seed in range(6):
            losses["ste", lr, seed] = base = 3.0 + draw.gauss(0, 0.1)
            losses["aa", lr, seed] = base + 0.03 + draw.gauss(0, 0.01)
            losses["stable", lr, seed] = base - 0.01 + draw.gauss(0, 0.02)
    comparison = summary_of(runs(losses, {"ste": STE, "aa": PARETOQ, "stable": STABLE}))
    family = [each for each in comparison.differences if each.quantity == "loss"]
    assert [each.p_holm for each in family] == holm([each.p for each in family if each.p is not None])
    assert len(family) == 4
    assert [each.verdict for each in family] == ["higher", "higher", "inconclusive", "inconclusive"]
    assert "the study names no margin" in notes(comparison)


def test_what_is_identical_or_capped_counts_in_no_family() -> None:
    """An arm that repeats the baseline, and a learning rate at which all diverge, change no p-value."""
    losses: dict[tuple[str, float, int], float | None] = {}
    for seed in range(4):
        for lr in LRS:
            losses["ste", lr, seed] = 3.0 + lr + seed / 10
            losses["stable", lr, seed] = 2.9 + lr + seed / 10 + seed / 50
        losses |= {("ste", 1.0, seed): None, ("stable", 1.0, seed): None}
    arms = {"ste": STE, "stable": STABLE, "aa": PARETOQ}
    alone = by_key(summary_of(runs(losses, arms)))
    for (name, lr, seed), loss in list(losses.items()):
        if name == "ste":
            losses["aa", lr, seed] = loss
    beside = by_key(comparison := summary_of(runs(losses, arms)))
    assert [key for key in alone if alone[key] != beside[key]] == []
    small = beside["StableQAT", "loss", 1e-3]
    assert small.p is not None
    assert small.p_holm == pytest.approx(2 * small.p)
    verdicts = {key: each.verdict for key, each in beside.items()}
    assert verdicts["StableQAT", "loss", 1.0] == verdicts["StableQAT", "worst loss", None] == "capped"
    assert verdicts["ParetoQ", "loss", 1e-3] == verdicts["ParetoQ", "lr sensitivity", None] == "identical"
    assert "(tests: loss: 2, reported loss: 1, lr sensitivity: 1, worst loss: 0)" in notes(comparison)


def test_flat_curves_are_identical_and_only_losses_at_the_cap_are_capped() -> None:
    arms = {"ste": STE, "stable": STABLE}
    flat = {(name, lr, seed): 3.0 + seed / 10 for name in arms for lr in LRS for seed in range(3)}
    verdicts = {key: each.verdict for key, each in by_key(summary_of(runs(flat, arms))).items()}
    assert {each for (name, *_), each in verdicts.items() if name == "StableQAT"} == {"identical"}
    lost = {key: None for key in flat} | {("ste", 1e-3, 9): 3.0}
    found = by_key(summary_of(runs(lost, arms)))
    assert found["StableQAT", "lr sensitivity", None].verdict == "capped"


def test_one_learning_rate_has_no_sensitivity() -> None:
    arms = {"ste": STE, "stable": STABLE}
    losses = {(name, 1e-3, seed): 3.0 + seed for name in arms for seed in range(3)}
    comparison = summary_of(runs(losses, arms))
    assert "lr sensitivity" not in {each.quantity for each in comparison.differences}
    assert "lr sensitivity" not in comparison.rows[0]


def test_each_bit_width_has_its_own_baseline(tmp_path: Path) -> None:
    arms = {
        f"{name}{bits}": arm | {"bits": bits} for bits in (3, 4) for name, arm in (("s", STE), ("q", STABLE))
    }
    losses = {(name, lr, seed): 3.0 for name in arms for lr in LRS for seed in (0, 1)}
    comparison = summary_of(runs(losses, arms), tmp_path)
    pairs = dict.fromkeys((each.arm, each.baseline) for each in comparison.differences)
    assert list(pairs) == [("StableQAT 3-bit", "STE 3-bit"), ("StableQAT 4-bit", "STE 4-bit")]
    (tmp_path / "study.yaml").write_text("compare: {baseline: {method: STE, bits: 4}}\n")
    comparison = summary_of(runs(losses, arms), tmp_path)
    assert {each.baseline for each in comparison.differences} == {"STE 4-bit"}


def test_one_seed_has_differences_but_no_tests() -> None:
    losses = {(name, lr, 0): 3.0 + lr for name in ("ste", "stable") for lr in LRS}
    comparison = summary_of(runs(losses, {"ste": STE, "stable": STABLE}))
    for each in comparison.differences:
        assert (each.n, each.mean, each.low, each.p, each.p_holm, each.verdict) == (
            1,
            0,
            None,
            None,
            None,
            "-",
        )
    assert [table.title for table in write_page(comparison).tables] == ["", "Loss by learning rate"]
    assert "Differences: not tested" in notes(comparison)


def test_a_study_of_one_arm_at_one_learning_rate_has_nothing_to_compare() -> None:
    comparison = summary_of(runs({("ste", 1e-3, 0): 3.0}, {"ste": STE}))
    assert comparison.differences == []
    assert "Differences: none" in notes(comparison)
    assert comparison.fits[0].sensitivity.mean is None
    (study,) = json.loads(as_json([write_page(comparison)]))["studies"]
    assert study["differences"] == []


def test_an_arm_at_some_learning_rates_is_compared_at_these() -> None:
    losses = {("ste", lr, seed): 3.0 for lr in LRS for seed in (0, 1)}
    losses |= {("stable", 1e-2, seed): 2.5 + seed / 8 for seed in (0, 1)}
    comparison = summary_of(runs(losses, {"ste": STE, "stable": STABLE}))
    assert [(each.quantity, each.lr) for each in comparison.differences] == [
        ("loss", 1e-2),
        ("reported loss", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compare: {baseline: {method: LSQ}}", r"selects no arm of STE, STE stretched, StableQAT"),
        ("compare: {baseline: {methd: STE}}", r"selects no arm of"),
        ("compare: {baseline: {method: STE}}", r"selects both STE and STE stretched: add a hyper-parameter"),
        ("compare: {baseline: STE}", r"compare.baseline: 'STE' must be a mapping"),
        ("compare: {margin: -1}", r"compare.margin: -1 must be a number of nats"),
        ("compare: {margin: small}", r"compare.margin: 'small' must be a number of nats"),
        ("compare: {cap: true}", r"compare.cap: True must be a number of nats"),
        ("compare: {margins: 0.1}", r"unknown key compare.margins: did you mean margin"),
        ("compare: [1]", r"compare must be a mapping"),
        ("compare: {margin: '${vars.m}'}", r"vars.*: correct the key compare.margin"),
        ("compare: {", r"line 2: not valid YAML"),
    ],
)
def test_mistakes_in_the_study_file(tmp_path: Path, text: str, message: str) -> None:
    arms = {"ste": STE, "stretched": STE | {"grid": "stretched"}, "stable": STABLE}
    found = runs({(name, 1e-3, 0): 3.0 for name in arms}, arms)
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"study\.yaml.*{message}"):
        _ = summary_of(found, tmp_path).differences


def test_the_study_file_may_say_the_cap(tmp_path: Path) -> None:
    """Without it no cap lies below a run that did not diverge, here 9, though all began at 4."""
    losses = {
        ("ste", 1e-3, 0): 4.5,
        ("stable", 1e-3, 0): 4.25,
        ("ste", 1e-2, 0): 9.0,
        ("stable", 1e-2, 0): None,
    }
    found = runs(losses, {"ste": STE, "stable": STABLE})
    comparison = summary_of(found, tmp_path)
    assert by_key(comparison)["StableQAT", "loss", 1e-3].mean == -0.25
    assert by_key(comparison)["StableQAT", "loss", 1e-2].verdict == "-"
    assert "Cap: 9 (just above the highest loss of a run that did not diverge, STE)" in notes(comparison)
    (tmp_path / "study.yaml").write_text("compare: {cap: 5}\n")
    comparison = summary_of(found, tmp_path)
    assert by_key(comparison)["StableQAT", "loss", 1e-3].mean == -0.25
    assert by_key(comparison)["StableQAT", "loss", 1e-2].mean == 0.0
    assert "Cap: 5 (the study's); a diverged run counts as the cap. Runs that ended above it" in notes(
        comparison
    )


def test_the_study_file_may_use_its_variables(tmp_path: Path) -> None:
    text = "vars: {m: 2e-2}\nargs: {x: '${vars.not_set}'}\ncompare: {margin: '${vars.m}'}\n"
    (tmp_path / "study.yaml").write_text(text)
    assert summary_of(runs({("ste", 1e-3, 0): 3.0}, {"ste": STE}), tmp_path).plan.margin == 0.02
    (tmp_path / "study.yaml").write_text("name: demo\n")
    assert summary_of(runs({("ste", 1e-3, 0): 3.0}, {"ste": STE}), tmp_path).plan.margin == 0.0

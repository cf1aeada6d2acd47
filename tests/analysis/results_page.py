"""What docs/results.md says, in pieces: those whose figures the event files give, and those that are given.

Given are settings, references, and what the page itself says that no event file holds.
"""

import math
from statistics import fmean
from typing import Any

import yaml
from figures import (
    AMPLITUDES,
    DSQ,
    FP,
    HARMONICS,
    NAMES,
    PARETOQ,
    PARTS,
    ROOT,
    SLOWER,
    STABLE,
    STABLE_STRETCHED,
    STE,
    apart,
    arm,
    as_ste_at,
    best,
    changes,
    control,
    cosine,
    count,
    demo_rows,
    difference,
    dose,
    flips_back,
    labels,
    last,
    loss,
    loss_at_3,
    mean,
    mean_of,
    minus,
    norm,
    octaves,
    pooled,
    ptq,
    recovered,
    seeds_row,
    sensitivity,
    series,
    share,
    spread,
    study,
    text_of,
    time,
    usable,
    where_ste_is_closer,
    wide_row,
    with_interval,
)

from stableqat.analysis.statistics import paired
from stableqat.studies.study import short


def results() -> str:
    return text_of((ROOT / "docs" / "results.md").read_text())


def in_results() -> list[str]:
    """Pieces of docs/results.md, from top to bottom."""
    return [
        *claims(),
        *tables(),
        *findings(),
        *design(),
        *controls(),
        *mismatch(),
        *grids(),
        *demo_rows(),
        f"QAT wins back {recovered()} of what rounding loses.",
        *GIVEN_IN_RESULTS,
    ]


def claims() -> list[str]:
    low, high = (arm("A", STABLE).sensitivity.band, arm("A", STE).sensitivity.band)
    assert low is not None
    assert high is not None
    ends = sorted((100 * (low.low / high.low - 1), 100 * (low.high / high.high - 1)))
    f = [difference("F", SLOWER, lr) for lr in study("F").lrs]
    assert [each.verdict for each in f] == ["equivalent", "lower", "equivalent", "lower"]
    assert [each.p_holm < 0.05 and each.mean < 0 for each in f] == [True, True, False, True]
    slower = [loss_at_3(label) for label in labels("SGD") if "weight_lr" in label]
    early = {label: f"{cosine(label, start=True):.2f}" for label in labels("E")}
    twice = [cosine(STABLE, start=start) / cosine(STE, start=start) for start in (False, True)]
    gain = {
        lr: ", ".join(
            [mean_of(minus("B", STABLE, STE, lr), "+.3f")]
            + [mean_of(difference("C", f"StableQAT {bits}-bit", lr), "+.3f") for bits in (3, 4)]
        )
        for lr in (1e-3, 4e-3, 8e-3)
    }
    assert not [each for each in study("B").differences if each.arm == DSQ and each.verdict == "higher"]
    identical = [each for each in study("C").differences if each.verdict == "identical" and each.lr]
    released = "STE scale_init absmax_as_step"
    all_four = sorted(f"{time(method):.2f}" for method in ("STE", "DSQ", "ParetoQ", "StableQAT"))
    by = {
        name: ", ".join(mean_of(minus("D", f"STE scale_init {name}", STE, lr), "+.2f") for lr in (1e-3, 8e-3))
        for name in ("max", "lsq")
    }
    return [
        f"2.0 M tokens of QAT per run, {count('A', 'B', 'C', 'D', 'SGD', 'E', 'F')} runs.",
        f"(1e-3 to 1.6e-2): {fmean(sensitivity('B', STABLE).values()):.3f} against"
        f" {fmean(sensitivity('B', STE).values()):.3f}, {with_interval(difference('B', STABLE))}, 8 seeds"
        " (B).",
        f"Over eight from 1e-4 on: {with_interval(difference('A', STABLE), 3)}, 2 seeds;",
        f"within 0.05 of the best span {usable(STABLE)} octaves against {usable(STE)},",
        f"both ends {ends[0]:.0f}-{ends[1]:.0f}% higher (A)",
        f"At lr 8e-3 a constant factor loses {mean(minus('D', 'ScaledSTE', STABLE, 8e-3)):.3f} against"
        " StableQAT,"
        f" shuffled factors {mean(minus('D', 'PermutedStableQAT', STABLE, 8e-3)):.3f} (2 seeds, D).",
        f"STE with {share(0.21):.2f} of the weights' learning rate, about what Adam leaves of a step",
        f"minus StableQAT: upward sensitivity {with_interval(difference('F', SLOWER), 3)}, loss lower at"
        " 4e-3 and"
        " 1.6e-2, equivalent at 1e-3 and 8e-3; before the margin counts, lower at three of four."
        f" {f[0].n} seeds (F, added after B)",
        f"SGD at lr 3, 10 times STE's best: STE {loss_at_3(STE):.2f}, StableQAT"
        f" {loss_at_3(STABLE):.2f}, constant g {loss_at_3('ScaledSTE'):.2f} and a run that the guard"
        " ended at a"
        f" finite loss; STE with a smaller step {min(slower):.2f}-{max(slower):.2f} (2 seeds, D)",
        f"2 bits, lr 1e-3: {with_interval(difference('B', STABLE, 1e-3))} (8 seeds, B); with A, D and F"
        f" {with_interval(pooled())} ({pooled().n} pairs).",
        f"3 and 4 bits, lr 3e-4: {mean_of(difference('C', 'StableQAT 3-bit', 3e-4))},"
        f" {mean_of(difference('C', 'StableQAT 4-bit', 3e-4))} (3 seeds, C).",
        f"A weight changes its code {changes(STE, 1e-3):.1f} times in such a run (B)",
        f"lr 1e-4: {with_interval(difference('A', STABLE, 1e-4))}, 3e-4:"
        f" {with_interval(difference('A', STABLE, 3e-4))}"
        " (2 seeds, A)",
        f"2, 3, 4 bits: lr 8e-3 {gain[8e-3]}; 4e-3 {gain[4e-3]}; 1e-3 {gain[1e-3]} (B, 8 seeds; C, 3 seeds)",
        f"at the start: STE {early[STE]}, DSQ {early[DSQ]}, StableQAT {early[STABLE]}, shuffled"
        f" {early['PermutedStableQAT']} (2 seeds, E).",
        f"for normal noise below {where_ste_is_closer():.2f} scales;",
        f"The cosine is {twice[0]:.1f} to {twice[1]:.1f} times STE's; the loss at lr 1e-3 moves by"
        f" {-mean(difference('B', STABLE, 1e-3)):.3f} |",
        f"lr 1e-3 {flips_back('B', STABLE, 1e-3):.3f}% against {flips_back('B', STE, 1e-3):.3f}%, 8e-3"
        f" {flips_back('B', STABLE, 8e-3):.3f}% against {flips_back('B', STE, 8e-3):.3f}% (B).",
        f"STE at 0.75 flips back {flips_back('F', SLOWER, 8e-3):.3f}% at 8e-3,",
        f"lr 8e-3: {series(loss('D', each, 8e-3) for each in AMPLITUDES.values())} at"
        f" {series(AMPLITUDES, '.2f')}; within {apart(AMPLITUDES.values())} at lr 1e-3 (2 seeds, D)",
        f"1, 2, 3 harmonics at lr 8e-3: {series(loss('D', each, 8e-3) for each in HARMONICS)};"
        f" within {apart(HARMONICS)} at 1e-3 (2 seeds, D)",
        f"the median norm is {norm(STABLE) / norm(STE):.2f} of STE's (B)",
        f"{with_interval(difference('B', DSQ, 8e-3), 3)} at lr 8e-3,"
        f" {with_interval(difference('B', DSQ, 1.6e-2), 3)}"
        " at 1.6e-2, nowhere higher than STE (8 seeds, B)",
        f"STE, lr 1e-3: {with_interval(difference('B', PARETOQ, 1e-3))}, StableQAT"
        f" {mean_of(minus('B', STABLE_STRETCHED, STABLE, 1e-3))};",
        f"reverses at 1.6e-2: {with_interval(difference('B', PARETOQ, 1.6e-2))} and, StableQAT,"
        f" {with_interval(minus('B', STABLE_STRETCHED, STABLE, 1.6e-2))} (8 seeds, B).",
        f"At 1e-4 {mean_of(difference('A', PARETOQ, 1e-4), '+.3f')} (2 seeds, A).",
        f"PTQ {ptq('B', PARETOQ):.3f} against {ptq('B', STE):.3f} |",
        f"the same losses to the last digit in {sum(each.n for each in identical)} pairs (C)",
        f"{all_four[0]}-{all_four[-1]} of full precision for all four in one fused kernel; the released DSQ"
        f" {time('stableqat_dsq'):.2f} ([benchmarks.md",
        f"as released: {mean_of(minus('D', released, STE, 1e-3), '+.2f')} at lr 1e-3,"
        f" {mean_of(minus('D', released, STE, 8e-3), '+.2f')} at 8e-3,",
        f"max {by['max']}, lsq {by['lsq']} (STE, 2 seeds, D)",
        f"at 8e-3 the surrogate ({-mean(minus('D', STABLE, STE, 8e-3)):.3f}) outweighs",
    ]


def tables() -> list[str]:
    new = [short(lr) for lr in study("A").lrs if lr not in study("B").lrs]
    own = {
        label: with_interval(difference("B", label)) + " "
        for label in NAMES.values()
        if label not in (STE, FP)
    }
    below = minus("F", SLOWER, STE, 1e-3)
    base = sensitivity("F", STE)
    slower = paired([value - base[seed] for seed, value in sensitivity("F", SLOWER).items()], 0.0)
    fall = {
        label: f"{loss('A', label, 3e-4) - loss('A', label, 1e-3):.3f}" for label in (STE, STABLE, PARETOQ)
    }
    start = study("B").full_precision
    assert min(loss("A", FP, lr) for lr in study("A").lrs) > (start or math.inf)
    trained = fmean(run.last["hp/initial_loss"] for run in arm("B", FP).cells[1e-3].runs)
    return [
        *(wide_row(name, label) for name, label in NAMES.items()),
        f"A has four more ({', '.join(new)})",
        *(seeds_row(name, "B", label, own.get(label, "")) for name, label in NAMES.items()),
        seeds_row(
            "*control (F, 5 other seeds):* STE, weights' lr x 0.75",
            "F",
            SLOWER,
            f"{with_interval(slower, 3)}, STE there: {spread(sensitivity('F', STE))} ",
        ),
        f"weights' learning rate is {-mean(below):.4f} {upward(below)} lower there than STE (F). From"
        " 3e-4 to 1e-3"
        f" STE gains {fall[STE]}, StableQAT {fall[STABLE]}, ParetoQ {fall[PARETOQ]}.",
        f"(training loss {trained:.2f}, validation {start:.2f})",
    ]


def upward(sample: Any) -> str:
    """The interval of a difference that is told as how much lower."""
    return f"[{-sample.high:.4f}, {-sample.low:.4f}]"


def findings() -> list[str]:
    start = " scale_init absmax_as_step"
    released = [minus("D", STABLE + start, STE + start, lr) for lr in (1e-3, 8e-3)]
    holm = [("StableQAT 3-bit", 4e-3), ("StableQAT 4-bit", 4e-3), ("StableQAT 3-bit", 8e-3)]
    assert [difference("C", *each).verdict for each in holm] == ["lower"] * 3
    return [
        f"{as_ste_at(3e-4):.2f} at 3e-4, {as_ste_at(4e-3):.2f} at 4e-3, {as_ste_at(8e-3):.2f} at 8e-3.",
        "up to 0.3, it equals STE at the same learning rate: differences of"
        f" {series((mean(minus('SGD', STABLE, STE, lr)) for lr in (0.01, 0.1, 0.3)), '+.4f')} (2 seeds, D).",
        f"it is {mean(released[0]):.3f} [{released[0].low:.3f}, {released[0].high:.3f}] worse than STE at"
        " lr 1e-3,"
        f" and {-mean(released[1]):.3f} lower at 8e-3 (2 seeds, D).",
        f"by {octaves(PARETOQ) - octaves(STE):.2f} octaves for STE and"
        f" {octaves(STABLE_STRETCHED) - octaves(STABLE):.2f} for StableQAT (2 seeds, A).",
        f"rounding gives {ptq('C', 'STE 3-bit'):.3f} and {ptq('C', 'STE 4-bit'):.3f}, STE at lr 3e-4, the"
        " lower edge,"
        f" {loss('C', 'STE 3-bit', 3e-4):.3f} and {loss('C', 'STE 4-bit', 3e-4):.3f} (3 seeds, C).",
        f"Holm's p {series(difference('C', *each).p_holm for each in holm)}.",
    ]


def design() -> list[str]:
    setting = yaml.safe_load((ROOT / "configs/llama/study/base.yaml").read_text())
    data, trainer = setting["data"]["init_args"], setting["trainer"]
    step, validated = data["batch_size"] * data["block_size"], trainer["limit_val_batches"]
    ended = [
        run
        for part in PARTS
        for each in study(part).fits
        for run in each.runs
        if run.last["hp/diverged"] == 1
    ]
    assert [run.folder.name for run in ended] == ["constant-b2-lr3-s31"]
    identical = [each for each in study("C").differences if each.verdict == "identical" and each.lr]
    largest = max(last(run) for each in study("B").fits for run in each.runs)
    return [
        f"validation loss {study('A').full_precision:.3f}), rounded to 2 bits with one scale per row (PTQ:"
        f" {ptq('A', STE):.3f}, stretched {ptq('A', PARETOQ):.3f}), and trained for"
        f" {trainer['max_steps']} steps of"
        f" {step:,} tokens from there",
        f"Loss: all {validated * step:,} tokens of {validated} validation batches, at the end.",
        f"{len(study('A').fits) - 1} arms + full precision x {len(study('A').lrs)} learning rates x 2 seeds,"
        f" descriptive | {count('A')} |",
        f"the same x {len(study('B').lrs)} learning rates x {difference('B', STABLE).n} new seeds;"
        " inference rests on"
        f" these | {count('B')} |",
        f"3 and 4 bits, 3 arms (ParetoQ is STE there: A/A) x {len(study('C').lrs)} learning rates x"
        f" {difference('C', 'StableQAT 3-bit').n} seeds | {count('C')} |",
        f"harmonics; SGD | {count('D', 'SGD')} |",
        f"the smoothed loss's | {count('E')} |",
        f"STE with 0.75 of the weights' learning rate x {len(study('F').lrs)} learning rates x"
        f" {difference('F', SLOWER).n} new seeds | {count('F')} |",
        f"the cap. It was PTQ's loss ({ptq('B', PARETOQ):.3f} at 2 bits), which at 3 and 4 bits lies below"
        " every loss"
        " at a large learning rate",
        f"it is {study('B').plan.cap} in all parts, and nothing in B depends on it (no loss above"
        f" {math.ceil(100 * largest) / 100:.2f}).",
        f"(at first they did: {len(identical)} of C).",
    ]


def controls() -> list[str]:
    plain = {label: f"{loss('D', label, 1e-3):.4f}; {loss('D', label, 8e-3):.4f}" for label in (STE, STABLE)}
    rows = {
        "stretched grid": ["stretched"],
        "no mask": ["mask none"],
        "initial scale lsq / max": ["scale_init lsq", "scale_init max"],
        "initial scale: range as the step, as released": ["scale_init absmax_as_step"],
        "scale lr x 0 / x 1 of lr (plain: 0.1)": ["scale_lr_multiplier 0", "scale_lr_multiplier 1"],
        "no clipping": ["gradient_clip_val 0"],
        "no warm-up": ["warmup_steps 0"],
    }
    cells = {
        name: " | ".join(" / ".join(control(f"{base} {v}", base) for v in variants) for base in (STE, STABLE))
        for name, variants in rows.items()
    }
    gain = -mean(minus("D", STABLE, STE, 8e-3))
    reached = [-100 * mean(minus("D", label, STE, 8e-3)) / gain for label in HARMONICS[1:]]
    unclipped = -mean(minus("D", f"{STABLE} gradient_clip_val 0", f"{STE} gradient_clip_val 0", 8e-3))
    predicted, measured = dose()
    excess = [m - p for p, m in zip(predicted, measured, strict=True)][:3]
    slow = {factor: f"STE weight_lr_multiplier {factor}" for factor in (0.1135, 0.3025, 0.405)}
    bests = [f"{best('SGD', label):.4f}" for label in slow.values()]
    assert loss("SGD", slow[0.1135], 3) == best("SGD", slow[0.1135])  # the upper edge
    at_1 = {label: loss("SGD", label, 1) for label in labels("SGD")}
    return [
        f"| plain arm | {plain[STE]} | {plain[STABLE]} |",
        f"| constant g (mean of StableQAT's) | {mean_of(minus('D', 'ScaledSTE', STE, 1e-3))};"
        f" {mean_of(minus('D', 'ScaledSTE', STE, 8e-3), '+.3f')} | |",
        f"| permuted g | | {control('PermutedStableQAT', STABLE)} |",
        *(f"| {name} | {text} |" for name, text in cells.items()),
        f"leaves Adam the same mean(g)/rms(g), {share(0.21):.2f}, and is"
        f" {mean(minus('D', 'PermutedStableQAT', STABLE, 8e-3)):.3f} worse than StableQAT at 8e-3; two"
        " and three"
        f" harmonics have {share(0.21, 2):.2f} and {share(0.21, 3):.2f} and reach {reached[0]:.0f}% and"
        f" {reached[1]:.0f}% of its gain.",
        f"without clipping it is {unclipped:.3f} instead of {gain:.3f}.",
        f"predict a gain over STE at 8e-3 of {series(predicted)} for amplitudes {series(AMPLITUDES, '.2f')};"
        f" measured, against STE of the same seeds: {series(measured)}. The excess at the three small ones,"
        f" {series(excess)}, has no control.",
        f"at its best learning rate STE {best('SGD', STE):.4f}, StableQAT {best('SGD', STABLE):.4f}, STE"
        " with 0.11 /"
        f" 0.30 / 0.41 of the weights' learning rate {bests[0]} (upper edge) / {bests[1]} / {bests[2]},"
        " constant g"
        f" {best('SGD', 'ScaledSTE'):.4f}. At lr 1 StableQAT is {at_1[STE] - at_1[STABLE]:.3f} below STE,"
        " STE with"
        f" 0.41 {at_1[STABLE] - at_1[slow[0.405]]:.3f} below StableQAT.",
        f"at lr 1 its quantized matrices step as those of STE with 0.30, and it is"
        f" {at_1['ScaledSTE'] - at_1[slow[0.3025]]:.4f} worse; at 3, {loss_at_3('ScaledSTE'):.2f} and a"
        " run that was"
        f" ended, against {loss_at_3(slow[0.3025]):.2f}.",
    ]


def mismatch() -> list[str]:
    order = ("PermutedStableQAT", STE, DSQ, STABLE)
    early, late = ([f"{cosine(label, start=start):.2f}" for label in order] for start in (True, False))
    tag = "quant/grad_cosine_se"
    errors = [v for each in study("E").fits for run in each.runs for v in run.scalars[tag].values()]
    return [
        f"standard error of one measurement {min(errors):.2f} to {max(errors):.2f}.",
        f"permuted {early[0]}, STE {early[1]}, DSQ {early[2]}, StableQAT {early[3]}.",
        f"At steps 80 and 160 of both: {', '.join(late)}.",
    ]


def grids() -> list[str]:
    """Where learning rates, widths and seeds are named without a figure beside them."""
    a, b = study("A").lrs, study("B").lrs
    at_best = min(a, key=lambda lr: loss("A", STABLE, lr))
    selected = [each.selected for each in study("B").fits]
    assert {(each.lr, each.edge) for each in selected} == {(b[0], "lower")}
    return [
        f"AdamW up to {short(a[-1])}, {a[-1] / at_best:.0f} times the best: no run diverged (A, C).",
        f"eight learning rates from {short(a[0])} to {short(a[-1])}.",
        "| arm | lr 1e-4 | 3e-4 | best lr | loss there |",
        f"Every arm's best is the lower edge, {short(b[0])}, so sensitivity",
        f"| arm | lr {short(b[0])} (lower edge) | {' | '.join(map(short, b[1:]))} | upward sensitivity |",
        f"{short(at_best)} is the best of A's grid, not the best there is: STE with 0.75 of the weights'",
        "StableQAT is lower there at 4e-3 for both widths and at 8e-3 for 3 bits, Holm's p",
    ]


GIVEN_IN_RESULTS = [
    "a model of 9.9 M parameters, one corpus, 2.0 M tokens",
    'with 95% t intervals; positive is worse. "Equivalent" means within 0.01, tested (TOST)',
    "smoothed by noise of 0.1 scales, at the start",
    "True by the yardstick of 0.1 scales, not in general",
    "A large amplitude is best (0.21 of at most 0.2251)",
    "At 2 bits a grid without 0, stretched over the range, is better",
    "**Supported** up to lr 4e-3; larger",
    "At 3 and 4 bits ParetoQ is LSQ",
    "STE and StableQAT, up to 5x more with DSQ",
    "Largest entry as the step at 2 bits, as released",
    "with our scale learning rate and 240 steps, so an upper bound",
    "Accuracy on Llama-3.2 1B and 3B, 10-30 B tokens",
    "## Loss against learning rate at 2 bits",
    "Usable: within 0.05 nats of it, read off a monotone cubic through the losses over log2(lr).",
    "With the released 2-bit start",
    "Between 3 and 4 bits little is left to win",
    "A Llama of 9.9 M parameters (6 layers of 320, vocabulary 8,192, tied) is trained in full precision"
    " on 204 M"
    " tokens (20.6 per parameter, 8 epochs of 25.5 M tokens",
    "warm-up of 20 steps, cosine, clipping at 1, scales at a tenth of the learning rate, bf16 autocast"
    " over float32",
    "0.3 and 3 were added to SGD's learning rates",
    "at lr 1e-3 and 8e-3. Of these two the better is nearly always 1e-3, the lower edge; for the released"
    " start it"
    " is 8e-3, the upper.",
    "**What 0.75 of the learning rate does not show.**",
    "(momentum 0.9, lr 0.01 to 3)",
    "--mismatch.every_n_steps 80, noise of 0.1 scales, 32 directions;",
    *("| A | 2bit.yaml |", "| B | 2bit-seeds.yaml |", "| C | 3-4bit.yaml |", "| F | 2bit-lr.yaml |"),
    "(constant-b2-lr3-s31)",
    *(
        "stableqat compare lightning_logs/published/study-2bit-seeds",
        "tensorboard --logdir lightning_logs/published/study-2bit-seeds",
        "stableqat sweep configs/llama/study/2bit.yaml",
        "stableqat compare lightning_logs/study-2bit.",
    ),
    "make demo, 2 bits, one seed, two CPU cores, torch 2.14;",
    # under the heading "What no event file holds"
    "noise of 0.25 scales found cosines of STE 0.32, DSQ 0.38, StableQAT 0.34, each +- 0.04.",
    "(28 M parameters, 200 steps, one seed) found StableQAT at lr 1e-2 below STE at 3e-3,",
    "four H200s, six runs per GPU, torch 2.11, 2026-11-22, about 17 minutes in all; the pretraining takes 3"
    " minutes on"
    " an H200, B 4.3 on four.",
    "StableQAT: arXiv 2601.19320. LSQ: arXiv 1902.08153. DSQ: arXiv 1908.05033. ParetoQ: arXiv 2502.02631. LR"
    " sensitivity: arXiv 2309.14322.",
]

"""Study files: which points they make, and how mistakes in them are named."""

import math
from pathlib import Path

import pytest
import yaml

from stableqat.errors import UserError
from stableqat.events import read_run
from stableqat.studies.command import sweep
from stableqat.studies.plan import LOGGED
from stableqat.studies.study import read_study, short

PUBLISHED = Path(__file__).parents[2] / "lightning_logs" / "published"
STUDY = """
vars: {steps: 200}
configs: [base.yaml]
args: {trainer.max_steps: "${vars.steps}"}
start: {args: {trainer.max_steps: 400}}
validate:
  ptq: {configs: [ste.yaml]}
grid:
  arm:
    fp:
    ste: {configs: [ste.yaml]}
    ste-b4: {configs: ste.yaml, args: {model.quantizer.init_args.bits: 4}}
  bits: [2, 3]
  lr: [3e-4, 0.1]
  seed: 0
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("model: {optimizer: {class_path: AdamW, init_args: {lr: 1e-2}}}\n")
    Path("ste.yaml").write_text("model: {quantizer: {class_path: STE, init_args: {bits: 8}}}\n")


def points(text: str) -> dict:
    Path("demo.yaml").write_text(text)
    return {point.name: point for point in read_study("demo.yaml").points}


def test_points_are_the_base_an_arm_and_a_value_of_each_axis() -> None:
    assert list(points(STUDY)) == [
        "start",
        "ptq-b2",  # lr and seed do not change what is only measured
        "ptq-b3",
        "fp-lr3e-4-s0",  # bits do not change full precision
        "fp-lr0.1-s0",
        "ste-b2-lr3e-4-s0",
        "ste-b2-lr0.1-s0",
        "ste-b3-lr3e-4-s0",
        "ste-b3-lr0.1-s0",
        "ste-b4-lr3e-4-s0",  # this arm sets the bits itself
        "ste-b4-lr0.1-s0",
    ]


def test_argv_is_an_ordinary_command_line() -> None:
    found = points(STUDY)
    place = "--trainer.logger.save_dir lightning_logs --trainer.logger.name demo --trainer.logger.version"
    begin = "--model.init_from lightning_logs/demo/start"
    assert {name: " ".join(found[name].argv) for name in ("start", "ptq-b2", "fp-lr0.1-s0")} == {
        "start": f"fit -c base.yaml --trainer.max_steps 400 {place} start",
        "ptq-b2": f"validate -c base.yaml -c ste.yaml --trainer.max_steps 200 {begin}"
        f" --model.quantizer.bits 2 {place} ptq-b2",
        "fp-lr0.1-s0": f"fit -c base.yaml --trainer.max_steps 200 {begin}"
        f" --model.optimizer.lr 0.1 --seed_everything 0 {place} fp-lr0.1-s0",
    }
    assert " ".join(found["ste-b4-lr3e-4-s0"].argv) == (
        f"fit -c base.yaml -c ste.yaml --trainer.max_steps 200 {begin} --model.quantizer.bits 4"
        f" --model.optimizer.lr 3e-4 --seed_everything 0 {place} ste-b4-lr3e-4-s0"
    )
    assert found["start"].command == "stableqat " + " ".join(found["start"].argv)


def test_all_points_but_the_start_run_wait_for_it_unless_they_begin_elsewhere() -> None:
    text = STUDY.replace("    fp:\n", "    fp: {args: {model.init_from: gpt}}\n")
    starts = {name: point.start.name if point.start else None for name, point in points(text).items()}
    assert {name for name, start in starts.items() if start is None} == {
        "start",
        "fp-lr3e-4-s0",
        "fp-lr0.1-s0",
    }
    assert set(starts.values()) == {"start", None}


def test_a_path_names_a_point_by_its_last_part() -> None:
    grid = "{arm: {ste: {configs: [ste.yaml]}}, model.init_from: [ptq/rtn, ptq/gptq]}"
    assert list(points(f"{{name: starts, grid: {grid}}}")) == ["ste-rtn", "ste-gptq"]
    with pytest.raises(UserError, match="two points are named ste-rtn"):
        points(f"{{name: starts, grid: {grid.replace('ptq/gptq', 'other/rtn')}}}")


def test_any_argument_can_be_an_axis() -> None:
    found = points("""
name: wide
logs: out
grid:
  arm: {ste: {configs: [ste.yaml]}, fp: }
  model.scale_lr_multiplier: [0.1, 1]
  model.quantizer.grid: [standard, stretched]
  trainer.limit: -1
""")
    assert list(found) == [
        "ste-scale_lr_multiplier0.1-gridstandard-limit-1",
        "ste-scale_lr_multiplier0.1-gridstretched-limit-1",
        "ste-scale_lr_multiplier1-gridstandard-limit-1",
        "ste-scale_lr_multiplier1-gridstretched-limit-1",
        "fp-scale_lr_multiplier0.1-limit-1",
        "fp-scale_lr_multiplier1-limit-1",
    ]
    point = found["fp-scale_lr_multiplier1-limit-1"]
    assert point.folder == Path("out/wide/fp-scale_lr_multiplier1-limit-1")
    # A value that begins with a dash would be taken for an option.
    assert point.argv[:4] == ["fit", "--model.scale_lr_multiplier", "1", "--trainer.limit=-1"]


def test_settings_change_with_what_decides_the_outcome_and_with_nothing_else() -> None:
    before = points(STUDY)["ste-b2-lr0.1-s0"].settings()
    assert before["model.optimizer.lr"] == 0.1  # the argument wins over base.yaml
    assert before["start.trainer.max_steps"] == 400

    Path("other.yaml").write_text("# as base.yaml\n" + Path("base.yaml").read_text())
    same = STUDY.replace("base.yaml", "other.yaml").replace("vars:", "name: renamed\nvars:")
    assert points(same)["ste-b2-lr0.1-s0"].settings() == before
    assert points(STUDY.replace("400", "401"))["ste-b2-lr0.1-s0"].settings() != before
    Path("ste.yaml").write_text("model: {quantizer: {class_path: DSQ, init_args: {bits: 8}}}\n")
    assert points(STUDY)["ste-b2-lr0.1-s0"].settings() != before


def test_an_argument_in_place_of_a_block_takes_the_quantizer_away() -> None:
    text = "configs: ste.yaml\ngrid: {arm: {fp: {args: {model.quantizer: null}}, ste: }, bits: [1, 2]}"
    assert list(points(text)) == ["fp", "ste-b1", "ste-b2"]
    assert "model.quantizer.class_path" not in points(text)["fp"].settings()


def test_axes_of_inputs_do_not_repeat_an_arm_that_does_not_quantize_them() -> None:
    inputs = {"model.input_quantizer.class_path": "LSQ"}
    mapped = {"model.input_quantizer": {"*": {"class_path": "LSQ", "init_args": {"bits": 4}}}}
    arms = {"fp": None, "ste": {"configs": ["ste.yaml"]}}
    arms |= {name: {"configs": ["ste.yaml"], "args": args} for name, args in (("a", inputs), ("m", mapped))}
    grid = {"arm": arms, "bits": 2, "model.input_quantizer.bits": [4, 8]}
    found = points(yaml.safe_dump({"grid": grid}, sort_keys=False))
    assert list(found) == ["fp", "ste-b2", "a-b2-bits4", "a-b2-bits8", "m-b2"]
    assert found["m-b2"].settings()["model.input_quantizer"] == mapped["model.input_quantizer"]
    assert not any("input_quantizer" in key for key in found["ste-b2"].settings())


ARM = "grid: {arm: {fp: }"
STES = (
    "grid: {arm: {fp: , ste: {args: {model.quantizer.class_path: stableqat.quantizers.STE}}}, bits: [2, 3]}"
)
TWO = STES.replace("bits:", "lr: [0.1, 0.2], bits:").replace(
    "ste:", "slow: {args: {x: 1, model.quantizer.class_path: STE}}, ste:"
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no such file"]),
        ("grid: [1\nname: a", ["line 2", "not valid YAML"]),
        ("- grid", ["mapping"]),
        ("name: a", ["grid is empty", "grid.arm"]),
        ("grid: {arm: {}, lr: 1e-3}", ["grid is empty", "grid.arm"]),
        (ARM + ", lr: []}", ["grid.lr is empty"]),
        ("nmae: a\n" + ARM + "}", ["unknown key nmae", "did you mean name?"]),
        ("grid: {arm: {fp: {arg: {}}}}", ["unknown key grid.arm.fp.arg", "did you mean args?"]),
        (ARM + ", seeds: 0}", ["unknown key grid.seeds", "did you mean seed?"]),
        (ARM + ", zzz: 0}", ["unknown key grid.zzz", "known here", "lr"]),
        ("configs: [gone.yaml]\n" + ARM + "}", ["configs", "gone.yaml: there is no such file"]),
        ("grid: {arm: {fp: {configs: gone.yaml}}}", ["grid.arm.fp.configs", "gone.yaml"]),
        (ARM + ", lr: [1e-3, fast]}", ["grid.lr", "'fast' must be a learning rate above 0"]),
        (ARM + ", lr: -1e-3}", ["grid.lr", "-0.001 must be a learning rate above 0"]),
        (ARM + ", lr: true}", ["grid.lr", "True must be a learning rate above 0"]),
        (ARM + ", seed: 0.5}", ["grid.seed", "whole number"]),
        (ARM + ", model.a: [{b: 1}]}", ["grid.model.a", "make it an arm"]),
        (ARM + ", lr: 1, model.optimizer.lr: 2}", ["grid.model.optimizer.lr", "same axis"]),
        (ARM + ", seed: [0, 1, 0]}", ["two points are named fp-s0"]),
        ("start: {}\ngrid: {arm: {start: }}", ["two points are named start"]),
        ("args: {trainer.max_steps: '${vars.gone}'}\n" + ARM + "}", ["vars.gone"]),
        (
            "args: {--trainer.max_steps: 1}\n" + ARM + "}",
            ["args", "is not an argument: write it as trainer.max_steps"],
        ),
        ("args: {ckpt_path: a}\n" + ARM + "}", ["ckpt_path is set by the sweep"]),
        ("args: [a]\n" + ARM + "}", ["args", "must be a mapping"]),
        ("name: ../a\n" + ARM + "}", ["name", "'../a'"]),
        ("logs: null\n" + ARM + "}", ["logs: None must be the name of a folder"]),
        ("args: !!python/object/apply:os.system [touch made]\n" + ARM + "}", ["line 1", "python/object"]),
        ("vars: &a {b: *a}\n" + ARM + "}", ["line 1", "recursive"]),
        ("compare: {basline: {method: STE}}\n" + ARM + "}", ["compare.basline", "did you mean baseline?"]),
        ("compare: {margin: -3}\n" + ARM + "}", ["compare.margin: -3 must be a number of nats"]),
        ("compare: {cap: hello}\n" + ARM + "}", ["compare.cap: 'hello' must be a number of nats"]),
        ("compare: {margin: .nan}\n" + ARM + "}", ["compare.margin: nan"]),
        ("compare: [1]\n" + ARM + "}", ["compare must be a mapping"]),
        ("compare: {baseline: STE}\n" + ARM + "}", ["compare.baseline: 'STE' must be a mapping"]),
        ("compare: {baseline: {bits: [2]}}\n" + ARM + "}", ["compare.baseline.bits", "one value"]),
        ("compare: {baseline: {methd: STE}}\n" + STES, ["compare.baseline.methd", "did you mean method?"]),
        ("compare: {baseline: {zzz: 1}}\n" + STES, ["compare.baseline.zzz", "known here: method"]),
        ("compare: {baseline: {method: DSQ}}\n" + STES, ["selects none", "their methods: STE"]),
        ("compare: {baseline: {method: STE, bits: 4}}\n" + STES, ["'bits': 4", "selects none"]),
        (
            "compare: {baseline: {method: STE}}\n" + TWO,
            ["selects two arms", "slow-lr0.1-b2 and ste-lr0.1-b2", "add a hyper"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_file_and_nothing_is_made(text: str | None, words: list[str]) -> None:
    if text is not None:
        Path("bad.yaml").write_text(text)
    before = sorted(Path().iterdir())
    with pytest.raises(UserError) as caught:
        sweep(["bad.yaml"])
    message = str(caught.value)
    assert message.startswith("bad.yaml")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    "baseline",
    [
        "{method: STE, grid: integer, bits: 3}",  # the grid is the method's default
        "{method: STE, gradient_clip_val: 0, warmup_steps: 20, optimizer: SGD}",
        "{bits: 2}",
        "{}",
    ],
)
def test_a_baseline_that_an_arm_can_be_is_taken(baseline: str) -> None:
    Path("good.yaml").write_text(f"compare: {{baseline: {baseline}}}\n{STES}")
    assert read_study("good.yaml").plan.baseline == yaml.safe_load(baseline)
    foreign = STES.replace("stableqat.quantizers.STE", "mine.Own")
    Path("good.yaml").write_text(f"compare: {{baseline: {{method: Own, sharpness: 3}}}}\n{foreign}")
    assert read_study("good.yaml").points


def test_what_runs_log_can_select_a_baseline() -> None:
    """The hyper-parameters of published runs."""
    runs = [read_run(folder) for folder in sorted(PUBLISHED.glob("study-*/*-s[0-9]*"))[::20]]
    logged = {key for run in runs for key in run.hparams} - {"lr", "seed", "subcommand"}
    assert {"method", "amplitude", "value"} <= logged <= set(LOGGED)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3e-4, "3e-4"),
        (1.25e-5, "1.25e-5"),
        (1e4, "1e4"),
        (0.1, "0.1"),
        (1.0, "1"),
        (-0.5, "-0.5"),
        (0.0, "0"),
        (math.inf, ".inf"),
        (-math.inf, "-.inf"),
        (math.nan, ".nan"),
        (2, "2"),
        (None, "null"),
        (True, "true"),
        ("stretched", "stretched"),
    ],
)
def test_values_are_written_as_one_types_them(value: object, text: str) -> None:
    assert short(value) == text


def test_what_is_no_number_is_an_argument_and_a_setting() -> None:
    text = "grid: {arm: {a: {args: {x: .nan}}}, trainer.limit: [.inf, -.inf]}"
    found = points(text)
    assert list(found) == ["a-limit.inf", "a-limit-.inf"]
    assert found["a-limit-.inf"].argv[:4] == ["fit", "--x", ".nan", "--trainer.limit=-.inf"]
    assert found["a-limit.inf"].settings() == points(text)["a-limit.inf"].settings()
    assert found["a-limit.inf"].settings()["trainer.limit"] == math.inf


def test_a_mapping_of_quantizers_is_one_value_that_quantizer_axes_leave_alone() -> None:
    mixed = {"model.layers.0.*": None, "*": {"class_path": "STE", "init_args": {"bits": 2}}}
    Path("mixed.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"quantizer": mixed}}}))
    arms = {"ste": {"configs": ["ste.yaml"]}, "file": {"configs": ["ste.yaml", "mixed.yaml"]}}
    arms["flag"] = {"args": {"model.quantizer": mixed}}
    arms["shorthand"] = {"configs": ["ste.yaml"], "args": {"model.quantizer": {"grid": "stretched"}}}
    found = points(yaml.safe_dump({"configs": ["base.yaml"], "grid": {"arm": arms, "bits": [2, 3]}}))
    assert list(found) == ["file", "flag", "shorthand-b2", "shorthand-b3", "ste-b2", "ste-b3"]
    for name in ("file", "flag"):
        settings = found[name].settings()
        assert {k: v for k, v in settings.items() if "quantizer" in k} == {"model.quantizer": mixed}
    flags = found["flag"].argv
    assert yaml.safe_load(flags[flags.index("--model.quantizer") + 1]) == mixed
    assert "--model.quantizer.grid" in found["shorthand-b2"].argv


def test_no_digit_is_lost() -> None:
    assert float(short(1 / 3000)) == 1 / 3000

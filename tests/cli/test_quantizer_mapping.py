"""`model.quantizer` as a mapping of layer patterns, from the command line to the exported folder."""

import json
import re

import pytest
import torch
import yaml

from stableqat.cli.arguments import check_arguments
from stableqat.cli.main import main

MIXED = {
    "*.mlp.down_proj": {"class_path": "stableqat.quantizers.STE", "init_args": {"bits": 4}},
    "o_proj": None,
    "*": {"class_path": "stableqat.quantizers.StableQAT", "init_args": {"bits": 2}},
}
OTHER = {"*": {"class_path": "stableqat.quantizers.STE", "init_args": {"grid": "stretched", "bits": 3}}}
RESET = "--model.quantizer=null"


def text(quantizer):
    return yaml.safe_dump({"model": {"init_args": {"quantizer": quantizer}}}, sort_keys=False)


@pytest.fixture
def files(at):
    for name, quantizer in (("mixed.yaml", MIXED), ("other.yaml", OTHER)):
        (at / name).write_text(text(quantizer))
    return at


def short(quantizer):
    if isinstance(quantizer, dict) and "class_path" in quantizer:
        return quantizer["class_path"].rpartition(".")[2] + str(quantizer["init_args"]["bits"])
    return {k: short(v) for k, v in quantizer.items()} if isinstance(quantizer, dict) else quantizer


FLAG = "{'*mlp*': {class_path: STE, init_args: {bits: 3}}, '*': null}"
LATER = {
    "a class over a mapping": (["-c", "mixed.yaml", "-c", "llama/ste"], "STE2"),
    "a mapping over a class": (["-c", "llama/ste", "-c", "other.yaml"], {"*": "STE3"}),
    "a mapping over a mapping": (["-c", "mixed.yaml", "-c", "other.yaml"], {"*": "STE3"}),
    "a flag over a mapping": (["-c", "mixed.yaml", "--model.quantizer", "DSQ"], "DSQNone"),
    "a class and its settings": (
        ["-c", "mixed.yaml", "--model.quantizer=STE", "--model.quantizer.bits", "3"],
        "STE3",
    ),
    "YAML in place of a file": (["-c", "mixed.yaml", "-c", text(OTHER["*"])], "STE3"),
    "a mapping as a flag": (["-c", "llama/ste", "--model.quantizer", FLAG], {"*mlp*": "STE3", "*": None}),
    "null": (["-c", "mixed.yaml", "--model.quantizer", "null"], None),
    "there and back": (
        ["-c", "other.yaml", "-c", "llama/ste", "-c", "mixed.yaml"],
        {"*.mlp.down_proj": "STE4", "o_proj": None, "*": "StableQAT2"},
    ),
    "null for a setting, as a flag": (
        ["-c", "llama/ste", "--model.quantizer.bits", "null", "--model.quantizer.levels", "3"],
        "STENone",
    ),
    "a setting of an entry": (
        ["-c", "other.yaml", "--model.quantizer.*.bits", "4"],
        {"*": "STE4"},
    ),
}


@pytest.mark.parametrize("case", LATER)
def test_the_later_quantizer_wins(case, files, capsys):
    layers, wanted = LATER[case]
    assert main(["fit", "-c", "llama.yaml", *layers, "--print_config"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["quantizer"]
    assert short(made) == wanted
    if isinstance(made, dict) and "class_path" not in made:
        assert list(made) == list(wanted)  # the first match wins


def test_quantizers_of_inputs_take_a_mapping_alike(files, capsys):
    """Over a mapping, a class replaces the whole of it and a setting is refused."""
    plus = {"class_path": "stableqat.quantizers.inputs.LSQPlus", "init_args": {"bits": 4}}
    inputs = {"model": {"init_args": {"input_quantizer": {"*down_proj": plus, "*": None}}}}
    (files / "inputs.yaml").write_text(yaml.safe_dump(inputs, sort_keys=False))
    base = ["fit", "-c", "llama.yaml", "-c", "llama/ste", "-c", "inputs.yaml"]
    for more, wanted in ([], {"*down_proj": "LSQPlus4", "*": None}), (["-c", "llama/w4a8"], "PerToken8"):
        assert main([*base, *more, "--print_config"]) == 0
        made = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["input_quantizer"]
        assert short(made) == wanted
    assert main([*base, "--model.input_quantizer.bits", "3"]) == 2
    assert "model.input_quantizer.bits: a mapping takes no bits of its own" in capsys.readouterr().err


def test_nothing_of_a_replaced_mapping_is_left(files, capsys):
    both = {"*": {"class_path": "stableqat.quantizers.STE", "init_args": {"bits": 2}}}
    (files / "both.yaml").write_text(text(both))
    assert main(["fit", "-c", "llama.yaml", "-c", "other.yaml", "-c", "both.yaml", "--print_config"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["quantizer"]
    assert made["*"]["init_args"]["grid"] is None


def test_a_class_over_a_class_keeps_its_settings_as_ever(files):
    argv = [
        "fit",
        "-c",
        "llama.yaml",
        "-c",
        "llama/ste",
        "--model.quantizer",
        "DSQ",
        "--model.quantizer.bits=3",
    ]
    assert RESET not in check_arguments(argv)
    argv = ["fit", "-c", "llama.yaml", "-c", "mixed.yaml", "-c", "llama/ste"]
    assert check_arguments(argv)[3] == check_arguments(argv)[6] == RESET
    assert check_arguments(check_arguments(argv)) == check_arguments(argv)  # as a process of a run gets them


def test_a_study_may_lay_a_class_over_a_mapping(files, monkeypatch):
    monkeypatch.setenv("STABLEQAT_STUDY", "1")
    argv = ["fit", "-c", "llama.yaml", "-c", "mixed.yaml", "--model.quantizer=STE"]
    assert check_arguments(argv) == [*argv[:3], RESET, *argv[3:-1], RESET, argv[-1]]


REFUSED = {
    "a setting over a mapping": (
        ["-c", "mixed.yaml", "--model.quantizer.bits", "3"],
        "model.quantizer.bits: a mapping takes no bits of its own; set it in the entries of the mapping",
    ),
    "a setting in a file": (
        ["-c", "mixed.yaml", "-c", "bits.yaml"],
        "bits.yaml: model.quantizer.bits: a mapping takes no bits of its own",
    ),
    "a setting without a class": (
        ["--model.quantizer=null", "--model.quantizer.bits", "3"],
        "model.quantizer.bits: comes before the class of quantizer; name that first, with -c or "
        "--model.quantizer CLASS",
    ),
    "an empty mapping": (["--model.quantizer", "{}"], "quantizer: the mapping is empty; give it a pattern"),
    "an empty mapping in YAML": (["-c", text({})], "quantizer: the mapping is empty; give it a pattern"),
    "nothing but null": (
        ["-c", text({"*": None})],
        "quantizer: every pattern of the mapping leaves its layers",
    ),
    "a number for a pattern": (["-c", text({1: None, **OTHER})], "quantizer: pattern 1 is not text"),
    "an unknown setting": (
        ["-c", text({"*.q_proj": {"class_path": "STE", "init_args": {"bitz": 2}}, **MIXED})],
        "model.quantizer.*.q_proj.bitz: unknown key; did you mean bits?",
    ),
    "a pattern that comes too late": (
        ["-c", text({**MIXED, "*.q_proj": "STE"})],
        "model.quantizer: * comes before *.q_proj, and the first match wins; put *.q_proj first",
    ),
    "a pattern that stands twice": (
        ["-c", "twice.yaml"],
        "twice.yaml: model.quantizer.*.mlp.*: stands twice, in lines 4 and 6, and YAML takes only the last",
    ),
    "YAML in place of a file": (
        ["-c", "{model: {init_args: {quantizer: {'*': STE, '*': DSQ}}}}"],
        "model.quantizer.*: stands twice, and YAML takes only the last",
    ),
    "a flag that names a pattern twice": (
        ["--model.quantizer", "{'*': {class_path: STE}, '*': {class_path: DSQ}}"],
        "model.quantizer.*: stands twice, and YAML takes only the last",
    ),
    "one setting twice in a joined flag": (
        ["--model.quantizer={'*': {class_path: STE, init_args: {bits: 2, bits: 3}}}"],
        "model.quantizer.*.bits: stands twice, and YAML takes only the last",
    ),
    "an unknown class": (
        ["-c", text({"q_proj": "STEE", **MIXED})],
        "model.quantizer.q_proj: STEE is not a Quantizer that can be imported; did you mean STE?",
    ),
    "a value of another type": (
        ["--model.quantizer", "{'*': {class_path: STE, init_args: {bits: two}}}"],
        "model.quantizer.*.bits: must be a whole number or null, not two",
    ),
    "a number for a quantizer": (
        ["-c", text({"v_proj": 3, **MIXED})],
        "model.quantizer.v_proj: 3 is not a Quantizer that can be imported",
    ),
    "a value out of range": (
        ["-c", text({"v_proj": {"class_path": "STE", "init_args": {"bits": 9}}, **MIXED})],
        "layer model.layers.0.self_attn.v_proj (pattern v_proj): bits: must be a whole number from 1 to 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_in_a_mapping_is_one_line(case, files, capsys):
    layers, line = REFUSED[case]
    (files / "bits.yaml").write_text(text({"init_args": {"bits": 3}}))
    entries = ["*.mlp.*", "*.q_proj", "*.mlp.*"]
    lines = ["model:", "  init_args:", "    quantizer:", *(f'      "{each}": STE' for each in entries)]
    (files / "twice.yaml").write_text("\n".join(lines))
    assert main(["fit", "-c", "llama.yaml", *layers]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


# -- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(place):
    """`logs/llama/mixed`: four steps with MIXED; `logs/llama/cut`: two steps, resumed for two more."""
    tree = yaml.safe_load((place / "llama.yaml").read_text())
    arguments = tree["model"]["init_args"]
    arguments["config"] |= {"intermediate_size": 64}  # rows of whole blocks in GGUF
    arguments |= {"quantizer": MIXED}
    (place / "mixed-run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    fit = ["fit", "-c", "mixed-run.yaml", "--last.every_n_train_steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "datasets")
        for name, steps in (("mixed", "4"), ("cut", "2")):
            assert main([*fit, "--trainer.max_steps", steps, "--trainer.logger.version", name]) == 0
        resume = [
            "fit",
            "-c",
            "logs/llama/cut/config.yaml",
            "--trainer.max_steps",
            "4",
            "--ckpt_path",
            "last",
        ]
        assert main(resume) == 0
    return "logs/llama/mixed"


def state(run):
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)


def test_a_mapped_run_resumes_bit_for_bit_from_its_own_configuration(mixed, at):
    whole, resumed = state(mixed), state("logs/llama/cut")
    assert resumed["global_step"] == whole["global_step"] == 4
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=0, atol=0)
    saved = yaml.safe_load((at / "logs/llama/cut/config.yaml").read_text())["model"]["init_args"]["quantizer"]
    assert list(saved) == list(MIXED)
    assert short(saved) == {"*.mlp.down_proj": "STE4", "o_proj": None, "*": "StableQAT2"}
    assert list(whole["hyper_parameters"]["quantizer"]) == list(MIXED)


def test_the_report_of_a_mapped_run_names_patterns(mixed, at):
    report = (at / mixed / "surgery.txt").read_text()
    assert "mlp.down_proj: STE 4-bit integer (*.mlp.down_proj)" in report
    assert "o_proj: quantizer: o_proj is null" in report


ANOTHER = {
    "another order": {"o_proj": None, **MIXED},
    "one pattern less": {k: v for k, v in MIXED.items() if k != "o_proj"},
    "other bits": {**MIXED, "*.mlp.down_proj": OTHER["*"]},
    "one class": OTHER["*"],
}


@pytest.mark.parametrize("case", ANOTHER)
def test_a_run_does_not_resume_with_another_mapping(case, mixed, files, capsys):
    (files / "another.yaml").write_text(text(ANOTHER[case]))
    resume = ["fit", "-c", "logs/llama/mixed/config.yaml", "-c", "another.yaml", "--ckpt_path", "last"]
    assert main([*resume, "--trainer.max_steps", "5"]) == 2
    assert "ckpt_path: model.quantizer" in (line := capsys.readouterr().err)
    assert "in the checkpoint" in line
    assert main(["validate", *resume[1:]]) == 0  # which says what replaces it
    said = capsys.readouterr().err
    assert len(re.findall("from the checkpoint replaces", said)) == (2 if case == "other bits" else 1)


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_an_exported_folder_says_which_quantizer_made_which_layers(format, mixed, at, tmp_path):
    out = tmp_path / "out"
    assert main(["export", mixed, "--format", format, "--out", str(out)]) == 0
    report = json.loads((out / "export.json").read_text())
    assert report["max_weight_difference"] == 0
    shared = {"grid": "integer", "granularity": "channel"}
    assert report["quantizers"] == [
        {"pattern": "*.mlp.down_proj", "layers": 1, "method": "STE", "bits": 4, **shared},
        {"pattern": "o_proj", "layers": 1, "method": "FP"},
        {"pattern": "*", "layers": 5, "method": "StableQAT", "bits": 2, **shared},
    ]
    card = (out / "README.md").read_text()
    assert "| \\*.mlp.down_proj | 1 | STE | 4 | integer | channel |" in card
    assert "| o_proj | 1 | FP |  |  |  |" in card


def test_what_is_evaluated_is_what_was_trained_and_exported(mixed, at, tmp_path):
    plain, figures = str(tmp_path / "hf"), tmp_path / "figures.json"
    assert main(["export", mixed, "--format", "hf", "--scale_dtype", "fp32", "--out", plain]) == 0
    assert main(["evaluate", mixed, plain, "--data", "text.jsonl", "--out", str(figures)]) == 0
    run, exported = json.loads(figures.read_text())["sources"]
    assert run["about"].startswith("mixed, ")
    losses = [each["perplexity"]["text.jsonl"]["loss"] for each in (run, exported)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)

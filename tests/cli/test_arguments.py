"""What is misspelt is refused before the libraries are imported, and nothing else is refused there."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from stableqat.cli.arguments import check_arguments
from stableqat.cli.main import main
from stableqat.errors import UserError

FIT = ["fit", "-c", "llama/base", "-c", "llama/stableqat"]
OWN = ["fit", "-c", "vit/base", "--model", "mine.Model", "--data", "mine.Data", "--model.quantizer", "mine.Q"]

# a command and what its line says
MISSPELT = [
    (["fti"], "fti is not a verb of stableqat; did you mean fit?"),
    (["fit", "-c", "none.yaml"], "none.yaml: there is no such file, and no shipped configuration"),
    (["validate", "-c", "vit/bsae"], "did you mean vit/base?"),
    (["fit", "-c", "own.yaml"], "own.yaml: trainer.max_stepz: unknown key; did you mean trainer.max_steps?"),
    ([*FIT, "--trainer.max_stepz", "3"], "trainer.max_stepz: unknown key; did you mean trainer.max_steps?"),
    ([*FIT, "--trianer.max_steps=3"], "trianer.max_steps: unknown key; did you mean trainer.max_steps?"),
    ([*FIT, "--max_steps", "3"], "max_steps: unknown key; did you mean trainer.max_steps?"),
    ([*FIT, "--guard.pateince", "3"], "guard.pateince: unknown key; did you mean guard.patience?"),
    (
        [*FIT, "--guard.xyz", "3"],
        "guard.xyz: unknown key; choose one of check_parameters_every, decay, margin,",
    ),
    ([*FIT, "--trainer.xyz", "3"], "trainer.xyz: unknown key; stableqat fit --help lists the settings"),
    ([*FIT, "--model.skp", "a"], "model.skp: unknown key; did you mean model.skip?"),
    (
        [*FIT, "--model.quantizer.bitz", "3"],
        "model.quantizer.bitz: unknown key; did you mean model.quantizer.bits?",
    ),
    ([*FIT, "--model.quantizer.init_args.bitz", "3"], "did you mean model.quantizer.bits?"),
    ([*FIT, "--data.sorce", "x"], "data.sorce: unknown key; did you mean data.source?"),
    ([*FIT, "--model.init_from", "/not/there"], "model.init_from: /not/there does not exist; name a run"),
    ([*FIT, "--data.source=not/there/at.all"], "data.source: not/there/at.all does not exist; name a file"),
    (
        [*FIT, "--data.source", "text/*.jsonl"],
        "data.source: text/*.jsonl does not exist (globs are not expanded); name a file, a folder",
    ),
    ([*FIT, "--data.tokenizer", "./tokenizer"], "data.tokenizer: ./tokenizer does not exist"),
    (
        [*FIT, "--ckpt_path", "none.ckpt"],
        "ckpt_path: none.ckpt does not exist; name a checkpoint, or leave it",
    ),
    (
        ["fit", "-c", "llama/ste", "-c", "llama/base"],
        "ste.yaml: changes the model, but nothing before it says",
    ),
    (
        ["fit", "-c", "llama/base", "-c", "llama/freezing", "-c", "llama/ste"],
        "freezing.yaml: changes the quantizer, but nothing before it says which quantizer; put a method",
    ),
    (["fit", "--config=llama/ste"], "put the base first, as in -c llama/base -c llama/ste"),
    (
        ["fit", "-c", "vit/finetune", "-c", "lean.yaml"],
        "lean.yaml: model.lean_loss: a setting of LlamaModule, but the model is ViTModule; leave it or the "
        "whole file out",
    ),
    (
        ["fit", "-c", "vit/base", "--data.block_size", "8"],
        "data.block_size: a setting of TextDataModule, but the data is ImageDataModule; leave it out",
    ),
    (["fit", "-c", "rows.yaml", "-c", "vit/base"], "rows.yaml: changes the data, but nothing before it says"),
    (["fit", "-c", "twice.yaml"], "twice.yaml: trainer.max_steps: stands twice, in lines 1 and 3, and YAML"),
    (["fit", "-c", "pipe"], "pipe: a pipe, which can be read only once, and settings are read more often"),
    (["evaluate", "none.ckpt"], "none.ckpt: there is no such run, checkpoint or folder"),
    (
        ["evaluate", "models/mine"],
        "models/mine: there is no such run, checkpoint or folder (models is a folder here, so the Hub is not",
    ),
    (["predict", "models/mine", "--prompt", "a"], "models/mine: there is no such run, checkpoint or folder"),
    ([*FIT, "--model.init_from", "models/mine"], "model.init_from: models/mine does not exist (models is a"),
    (["export", "none", "--format", "hf", "--out", "out"], "none: there is no such run or checkpoint"),
    (["export", "none", "--fromat", "hf"], "fromat: unknown key; did you mean format?"),
    (["consolidate", "none.ckpt"], "none.ckpt"),
    (["import", "none", "--from", "paretoq", "--out", "out"], "none"),
    (["sweep", "none.yaml"], "none.yaml: there is no such file"),
    (["compare", "none"], "none: no event files"),
    (["publish", "none"], "none"),
    (["bench", "--model", "nonesuch", "--batch", "1"], "model: nonesuch is unknown"),
]
FREE = {
    "a user's classes": [*OWN, "--model.depth=3", "--data.folder=a", "--model.quantizer.width=2"],
    "a start that may be on the Hub": [*FIT, "--model.init_from=org/name", "--data.source=name"],
    "a start that a later file may replace": [*FIT, "--model.init_from=/not/there", "-c", "llama/debug"],
    "a start that a later flag replaces": [*FIT, "--model.init_from=/not/there", "--model.init_from=null"],
    "options of classes inside": [*FIT, "--model.optimizer.fused=true", "--trainer.strategy.x=1"],
    "a quantizer for each pattern": [*FIT[:3], "--model.quantizer", "{'*.mlp.*': {class_path: STE}}"],
    "keys of an architecture": [*FIT, "--model.config.anything=1"],
    "what only parsers know": [*FIT, "--print_config=skip_null", "--model.help=A", "--trainer.callbacks+=X"],
    "settings as YAML": ["fit", "--config", "trainer: {max_stepz: 3}"],
    "a class named in YAML": [
        *("fit", "-c", "llama/base", "-c", "llama/ste", "-c"),
        "model: {init_args: {quantizer: {class_path: stableqat.quantizers.StableQAT}}}",
        *("--model.quantizer.amplitude", "0.2"),
    ],
    "a user's class named in YAML": ["fit", '--config={"model": {"class_path": "my.Mine"}}', "--model.x=3"],
    "an overlay of a class that a flag names": ["fit", "--model", "LlamaModule", "-c", "llama/ste"],
    "settings of the trainer before the base": ["fit", "-c", "llama/fsdp", "-c", "llama/base"],
    "a file that was forgotten": [*FIT, "-c", "--trainer.max_steps=3"],
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "own.yaml").write_text("trainer: {max_stepz: 3}")
    (tmp_path / "lean.yaml").write_text("model: {init_args: {lean_loss: true}}")
    (tmp_path / "rows.yaml").write_text("data: {init_args: {batch_size: 3}}")
    (tmp_path / "twice.yaml").write_text(
        "trainer: {max_steps: 1,\n logger: &again {a: [*again]},\n max_steps: 2}"
    )
    os.mkfifo(tmp_path / "pipe")


def test_torch_is_not_imported_for_what_is_misspelt(elsewhere):
    code = (
        "import json, sys; from stableqat.cli.main import main;"
        "codes = list(map(main, json.loads(sys.argv[1])));"
        "assert set(codes) == {2}, codes;"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)"
    )
    argv = [sys.executable, "-c", code, json.dumps([command for command, _ in MISSPELT])]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(MISSPELT)
    for (command, said), line in zip(MISSPELT, lines, strict=True):
        assert line.startswith("stableqat: ")
        assert said in line, command


@pytest.mark.parametrize("case", FREE)
def test_the_parser_decides_what_is_not_certain(case, elsewhere):
    assert len(check_arguments(FREE[case])) == len(FREE[case])


@pytest.mark.parametrize("verb", ["fit", "test"])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_what_the_parser_takes_is_not_refused(family, verb, capsys):
    argv = [verb, "-c", f"{family}/base", "-c", f"{family}/dsq"]
    assert main([*argv, "--print_config"]) == 0
    keys = flat(yaml.safe_load(capsys.readouterr().out))
    assert len(keys) > 100
    check_arguments([*argv, *(f"--{key}=null" for key in keys)])
    assert main([verb, "--help", "all"]) == 0
    options = set(re.findall(r"--[a-z_.]+", capsys.readouterr().out))
    assert len(options) > 60
    check_arguments([*argv, *(option for option in options if "." not in option)])
    with pytest.raises(UserError):
        check_arguments([*argv, *(f"--{key}s=null" for key in keys)])


def flat(tree, prefix=""):
    if not isinstance(tree, dict) or not tree:
        return [prefix]
    return [inner for key, each in tree.items() for inner in flat(each, f"{prefix}.{key}" if prefix else key)]

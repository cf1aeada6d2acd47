"""Help comes at once, because nothing heavy is imported for it, and says what the docstrings say."""

import json
import re
import subprocess
import sys

import pytest

from stableqat.cli.help import run_settings
from stableqat.cli.main import main

HEAVY = [
    "torch",
    "lightning",
    "transformers",
    "tensorboard",
    "matplotlib",
    "datasets",
    "timm",
    "numpy",
    "sklearn",
]

ASK = """
import contextlib, io, json, sys
from stableqat.cli.main import TOOL_VERBS, main

texts = {}
for verb in ("", *TOOL_VERBS):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main([*verb.split(), "--help"]) == 0
    texts[verb] = text.getvalue()
print(json.dumps([texts, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def fresh():
    """Help texts from a process that only asked for help, and the modules that it imported."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert not done.stderr
    return json.loads(done.stdout)


def test_help_imports_nothing_heavy(fresh):
    _, modules = fresh
    assert not {name.split(".")[0] for name in modules} & set(HEAVY)


def test_help_tells_the_verbs(fresh):
    text = fresh[0][""]
    for verb in ("fit", "validate", "test", "predict", "sweep", "compare", "bench"):
        assert f"\n  {verb} " in text
    assert "--debug" in text


def test_help_of_a_tool_tells_its_arguments(fresh):
    assert "studies" in fresh[0]["sweep"]
    assert "--workers" in fresh[0]["sweep"]
    assert "folders" in fresh[0]["compare"]
    assert "--out" in fresh[0]["compare"]
    assert "--rival RIVAL [RIVAL ...]" in fresh[0]["bench"]


def test_no_arguments_are_a_cry_for_help(capsys):
    assert main([]) == 0
    assert "usage: stableqat VERB" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
@pytest.mark.parametrize("asked", [["--help"], ["-h"], ["-c", "llama/base", "--help"]])
def test_help_of_a_run_tells_what_people_set(verb, asked, capsys):
    assert main([verb, *asked]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: stableqat {verb} -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]\n")
    assert f"stableqat {verb} -c llama/finetune --model.init_from" in printed
    text = " ".join(printed.split())
    assert "--model.quantizer.bits Storage width of a code, 1 to 8" in text
    assert "--model.quantizer.scale_init" in printed
    assert "[signed_mse]" in printed
    assert (
        "--model.scale_lr_multiplier Learning rate of the quantizers' parameters as a share of lr. [0.1]"
        in text
    )
    assert "--data.block_size" in printed
    assert "--trainer.max_steps Stop training after this number of steps. [300]" in text
    assert max(map(len, printed.splitlines())) <= 105
    assert not re.search(r"``|:class:|\b(None|True|False)\b", printed)
    ending = printed.partition("Shipped configurations for -c")[2].split()
    assert {"llama/base", "llama/stableqat", "vit/deit-small"} <= set(ending)
    assert not {"llama/demo-study", "llama/study/2bit"} & set(ending)


@pytest.mark.parametrize("rest", [["al"], ["all", "extra"]])
def test_help_of_something_else_is_a_mistake(rest, capsys):
    assert main(["fit", "--help", *rest]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"stableqat: help: takes nothing or all, not {' '.join(rest)}; write --help all\n"


def test_every_setting_of_that_page_exists():
    known = run_settings("fit")
    assert {
        "model.init_from",
        "model.quantizer.group_size",
        "data.augment",
        "trainer.devices",
    } <= known.keys()
    assert all(known.values())


def test_help_of_a_run_imports_nothing_heavy():
    code = "import sys; from stableqat.cli.main import main; main(['fit', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()} & set(HEAVY)


def test_help_all_tells_the_docstrings(capsys):
    assert main(["fit", "--help", "all"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: stableqat fit -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]\n")
    assert "--model.help LlamaModule" in printed
    assert not re.search(r"\b(None|True|False)\b", printed)
    headings = [line for line in printed.splitlines() if line[:1].strip() and line.endswith(":")]
    assert not [line for line in headings if re.search(r"\b(via flags|advantage is|Useful to):$", line)]
    text = " ".join(printed.split())
    assert "--trainer.max_steps" in text
    assert "--guard.patience" in text
    assert "Consecutive optimizer steps for which it may stay above that." in text


def test_help_of_a_class_tells_its_docstring(capsys):
    assert main(["fit", "--model.help", "LlamaModule"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Learning rate of the quantizers' parameters as a share of `lr`." in text

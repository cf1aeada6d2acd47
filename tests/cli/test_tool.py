"""The flags of tool verbs."""

import signal
import subprocess
import sys

import pytest

from stableqat.cli.tool import run_tool, tool_parser

BENCH = ["--model", "M", "--batch", "1"]


@pytest.mark.parametrize(
    ("verb", "flags", "key", "values"),
    [
        ("predict", ["RUN", "--images", "a", "b", "--images=c"], "images", ["a", "b", "c"]),
        ("bench", [*BENCH, "--methods", "ste", "--methods", "dsq"], "methods", ["ste", "dsq"]),
        ("bench", [*BENCH, "--modes", "graphed", "--modes", "eager"], "modes", ["graphed", "eager"]),
        ("bench", [*BENCH, "--decode", "1", "--decode", "2", "3"], "decode", [1, 2, 3]),
        ("bench", BENCH, "methods", ["all"]),
    ],
)
def test_a_list_given_again_adds_up(verb, flags, key, values):
    assert tool_parser(verb).parse_args(flags)[key] == values


@pytest.mark.parametrize(
    "flags",
    [
        ["--dry-run", "llama/demo-study"],
        ["llama/demo-study", "--dry_run"],
        ["--dry_run", "yes", "llama/demo-study"],
    ],
    ids=" ".join,
)
def test_a_switch_needs_no_value_and_takes_dashes(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_tool("sweep", flags) == 0
    assert "ste-b2" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


EXPORT = """
import sys, time
from stableqat.cli.main import main
from stableqat.export import source
source.load_source = lambda *_: print("loading", flush=True) or time.sleep(600)
sys.exit(main(["export", "run", "--format", "hf", "--out", "new/out"]))
"""


def test_a_verb_that_is_told_to_end_leaves_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", EXPORT]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "loading\n"
        assert list(tmp_path.glob("new/.out.*.part"))
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

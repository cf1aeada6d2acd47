"""`stableqat runs`: every run under a folder in a line, whatever became of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_compare import log_run

from stableqat.cli.main import main

HOLDER = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
)
STE = {"method": "STE", "bits": 2, "grid": "integer", "max_steps": 8, "subcommand": "fit"}


def finished(loss: float, **more: float) -> dict[str, dict[int, float]]:
    ended = {"hp/steps": 8, "hp/diverged": 0, "hp/finished": 1} | more
    return {"val/loss": {4: loss + 1, 8: loss}, "val/perplexity": {8: 9.0}} | {
        tag: {8: value} for tag, value in ended.items()
    }


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    start = {"hp/loss_fp": 2.5, "hp/loss_ptq": 7.25}
    log_run(folder / "llama/version_10", STE | {"lr": 1e-3}, finished(3.5, **start))
    log_run(folder / "llama/version_9", STE | {"lr": 1e-2, "bits": 4}, finished(3.0, **{"hp/diverged": 1}))
    log_run(folder / "sweep/cut", STE | {"lr": 1e-4}, {"train/loss": {1: 5.0, 3: 4.0}, "hp/steps": {0: 0}})
    log_run(
        folder / "vit/ptq",
        {"method": "STE", "subcommand": "validate"},
        {"val/loss": {0: 8.0}, "val/top1": {0: 0.5}},
    )
    file = log_run(folder / "damaged", STE | {"lr": 1e-3}, {})
    file.write_bytes(file.read_bytes()[:20])
    (folder / "sweep/failed").mkdir()
    (folder / "sweep/failed/sweep.json").write_text("{}")
    log_run(folder / ".replaced/old", STE, finished(1.0))
    for age, path in enumerate(sorted(folder.rglob("events*")), 1):
        os.utime(path, (1e9 - age, 1e9 - age))
    return folder


def listed(logs: Path, capsys: pytest.CaptureFixture, *flags: str) -> dict[str, dict]:
    assert main(["runs", str(logs), "--json", "true", *flags]) == 0
    rows = json.loads(capsys.readouterr().out)
    return {str(Path(row["name"]).relative_to(logs)): row for row in rows}


def test_what_became_of_each_run(logs, capsys):
    rows = listed(logs, capsys)
    assert {name: row["state"] for name, row in rows.items()} == {
        "llama/version_10": "finished",
        "llama/version_9": "diverged",
        "sweep/cut": "stopped",
        "vit/ptq": "finished",
        "damaged": "damaged",
        "sweep/failed": "failed",
    }
    row = rows["llama/version_10"]
    assert [row[key] for key in ("family", "method", "bits", "grid", "lr")] == [
        "text",
        "STE",
        2,
        "integer",
        1e-3,
    ]
    assert [row[key] for key in ("step", "planned", "best_loss", "loss_ptq", "loss_fp")] == [
        8,
        8,
        3.5,
        7.25,
        2.5,
    ]
    assert [rows["sweep/cut"][key] for key in ("step", "planned", "best_loss")] == [3, 8, None]
    assert rows["vit/ptq"]["family"] == "images"


@pytest.mark.parametrize(
    ("column", "first"),
    [("age", "sweep/failed"), ("name", "damaged"), ("bits", "llama/version_10"), ("loss", "llama/version_9")],
)
def test_rows_are_sorted_and_the_unknown_comes_last(column, first, logs, capsys):
    names = list(listed(logs, capsys, "--sort", column))
    assert names[0] == first
    if column == "name":
        assert names.index("llama/version_9") < names.index("llama/version_10")
    if column == "loss":
        assert set(names[-3:]) == {"damaged", "sweep/cut", "sweep/failed"}


def test_the_table_aligns(logs, capsys):
    assert main(["runs", str(logs)]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["name", "family", "method", "bits"]
    [line] = [line for line in lines if "version_10" in line]
    assert line.split()[1:10] == ["text", "STE", "2", "integer", "1e-3", "finished", "8/8", "3.5", "7.25"]
    assert line.index("STE") == heading.index("method")


def test_a_table_that_is_too_wide_leaves_out_what_matters_least(logs, monkeypatch, capsys):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    heads = []
    for width in (400, len(str(logs)) + 90, 20):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["runs", str(logs)]) == 0
        heads.append(capsys.readouterr().out.splitlines()[0])
    assert all(word in heads[0] for word in ("family", "grid", "full precision", "size", "steps"))
    assert "family" not in heads[1]
    assert len(heads[1].rstrip()) <= len(str(logs)) + 90
    assert heads[2].split() == ["name", "method", "bits", "lr", "state", "best", "rounded", "age"]


def test_published_copies_are_listed_where_they_are_asked_for(tmp_path, capsys):
    log_run(tmp_path / "logs/llama/mine", STE | {"lr": 1e-3}, finished(3.0))
    for name in ("a", "b"):
        log_run(tmp_path / "logs/published/study" / name, STE | {"lr": 1e-3}, finished(3.5))
    said = " left out; name a published folder to list its runs"
    copies = ["logs/published/study/a", "logs/published/study/b"]
    for folders, names, left in (
        (["logs"], ["logs/llama/mine"], ["2 published runs" + said]),
        (["logs/published"], copies, []),
        (["logs/published/study"], copies, []),
        (["logs", "logs/published/study/a"], ["logs/llama/mine", copies[0]], ["1 published run" + said]),
    ):
        assert main(["runs", *(str(tmp_path / each) for each in folders), "--sort", "name"]) == 0
        _, *lines = capsys.readouterr().out.splitlines()
        assert [str(Path(line.split()[0]).relative_to(tmp_path)) for line in lines[: len(names)]] == names
        assert lines[len(names) :] == left


def test_a_run_that_another_process_writes_is_running(tmp_path, capsys):
    log_run(tmp_path / "now", STE, {"train/loss": {1: 5.0}})
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "now/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline()
        assert listed(tmp_path, capsys)["now"]["state"] == "running"
        holder.kill()
    assert listed(tmp_path, capsys)["now"]["state"] == "stopped"  # killed: its lock file stays


def test_a_folder_without_runs_and_no_folder(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs under {tmp_path}\n"
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "none is not a folder" in capsys.readouterr().err


def test_it_imports_no_torch(logs):
    code = "import sys; from stableqat.cli.main import main; main(['runs', sys.argv[1]])"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(logs)], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        (STE | {"input_bits": 8}, "STE W2A8 integer"),
        (STE | {"attention": "key, value: PerToken 8 ste none"}, "STE 2, attention 8 integer"),
        (
            {"method": "FP", "attention": "query, key: LSQ 4 ste range; value: LSQ 4 ste none; 2 value: Own"},
            "FP attention 4 - - finished",
        ),
    ],
)
def test_the_widths_of_a_run_that_quantizes_activations(settings, shown, tmp_path, capsys):
    log_run(tmp_path / "one", settings, finished(3.0))
    assert main(["runs", str(tmp_path)]) == 0
    assert f" {shown} " in " ".join(capsys.readouterr().out.splitlines()[1].split())

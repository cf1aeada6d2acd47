"""A shell completes verbs, settings and choices from the script alone."""

import shutil
import subprocess

import pytest

from stableqat.cli.main import main


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "stableqat"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["comp"], {"compare", "completion"}),
        (["fit", "--model.quantizer.gr"], {"--model.quantizer.grid", "--model.quantizer.group_size"}),
        (["data", "to"], {"tokenize"}),
        (["export", "run", "--format", "gg"], {"gguf"}),
        (["validate", "--trainer.max_st"], {"--trainer.max_steps"}),
    ],
)
def test_bash_completes(script, words, expected):
    line = " ".join(["stableqat", *words])
    code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; "
    code += "_shtab_stableqat; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_an_unknown_shell_is_one_line(capsys):
    assert main(["completion", "powershell"]) == 2
    assert "bash" in capsys.readouterr().err

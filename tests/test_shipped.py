"""The shipped configurations are found by name from any folder, in a checkout and in what is installed."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from stableqat.cli.main import main
from stableqat.errors import UserError
from stableqat.shipped import SHIPPED, find_config, shipped_names
from stableqat.studies.study import read_study

ROOT = Path(__file__).parents[1]
STUDIES = [
    name for name in shipped_names() if "grid" in yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["llama/base", "llama/base.yaml", "configs/llama/base.yaml"])
def test_a_name_means_the_shipped_configuration(name, elsewhere):
    assert find_config(name).samefile(ROOT / "configs/llama/base.yaml")


@pytest.mark.parametrize("name", ["llama/base", "llama/base.yaml"])
def test_a_file_of_the_current_folder_comes_first(name, elsewhere):
    own = elsewhere / "llama" / "base.yaml"
    own.parent.mkdir()
    own.write_text("trainer: {max_steps: 3}")
    assert find_config(name).samefile(own)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("llama/stablqat", "did you mean llama/stableqat?"),
        ("base", "did you mean llama/base, llama/smollm2/base, llama/study/base, vit/base, vit/dinov2/base?"),
        ("mine.yaml", "stableqat fit --help lists the shipped ones"),
        ("../configs/llama/base", "did you mean"),
        ("", "stableqat fit --help lists the shipped ones"),
    ],
)
def test_a_name_of_nothing_is_refused(name, remedy, elsewhere):
    with pytest.raises(UserError) as caught:
        find_config(name)
    assert str(caught.value).startswith(
        f"{name}: there is no such file, and no shipped configuration of this"
    )
    assert remedy in str(caught.value)


def test_fit_takes_names_from_any_folder(elsewhere, capsys):
    argv = ["fit", "-c", "llama/base", "--config=llama/stableqat.yaml", "--print_config"]
    assert main(argv) == 0
    printed, said = capsys.readouterr()
    assert yaml.safe_load(printed)["model"]["init_args"]["quantizer"]["init_args"]["bits"] == 2
    assert not said
    (elsewhere / "llama").mkdir()
    shutil.copy(SHIPPED / "llama" / "base.yaml", elsewhere / "llama")
    (elsewhere / "llama" / "stableqat.yaml").write_text("trainer: {max_steps: 3}")
    assert main(argv) == 0
    printed, said = capsys.readouterr()
    assert yaml.safe_load(printed)["trainer"]["max_steps"] == 3
    assert said == "stableqat: llama/stableqat.yaml: the file here, not the shipped configuration\n"
    assert main(["fit", "-c", "trainer: {max_stepz: 3}"]) == 2
    assert "trainer.max_stepz: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize("name", STUDIES)
def test_a_shipped_study_is_read_from_any_folder(name, elsewhere):
    study = read_study(find_config(name))
    point = study.points[-1]
    files = [value for flag, value in zip(point.argv, point.argv[1:], strict=False) if flag == "-c"]
    assert all(find_config(file).is_relative_to(SHIPPED) for file in files)
    assert len(files) >= 2


def test_what_is_built_holds_them_all(tmp_path):
    pytest.importorskip("setuptools")
    shutil.copytree(
        ROOT / "src", tmp_path / "src", symlinks=True, ignore=shutil.ignore_patterns("*.egg-info")
    )
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta as b; b.build_sdist('.'); b.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    [wheel], [sdist] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    shipped = {f"stableqat/configs/{name}.yaml" for name in shipped_names()}
    assert shipped <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        members = {each.name.partition("/src/")[2] for each in archive if each.isfile()}
    assert shipped <= members

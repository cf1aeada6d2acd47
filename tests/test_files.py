"""Files and folders appear once they are complete, for whoever the umask lets read."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stableqat.files import whole_file, whole_folder


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_weights_can_be_read_by_whom_the_umask_allows(tmp_path: Path, mode: int) -> None:
    weights = {"weight": torch.zeros(2)}
    with whole_folder(tmp_path / "model") as folder:
        (folder / "part").mkdir()
        save_file(weights, folder / "part" / "model.safetensors")
        (folder / "elsewhere").symlink_to("/nowhere")
    with whole_file(tmp_path / "alone.safetensors") as file:
        save_file(weights, file)
    for path in (tmp_path / "model" / "part" / "model.safetensors", tmp_path / "alone.safetensors"):
        assert path.stat().st_mode & 0o777 == mode


def _begin(path: Path) -> None:
    (path / "half" if path.is_dir() else path).touch()
    raise OSError("full")


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    for writing in (whole_folder(tmp_path / "new" / "model"), whole_file(tmp_path / "file")):
        with pytest.raises(OSError, match="full"), writing as path:
            _begin(path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "model"):
        (tmp_path / "model").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

"""Every notebook: what is kept in it is whole and names no machine, and all of it runs again in a minute."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
LONG = {"basin", "initialisation", "stability", "vit_ablation"}  # they train
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w<.])/(?:home|mnt|private|root|tmp|Users|usr|var|work)/")


def _parameters(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def _outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def _texts(output: nbformat.NotebookNode) -> list[str]:
    """What a reader reads of an output; a picture's base64 holds slashes of its own."""
    data = output.get("data", {})
    return [output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))]


def test_there_are_notebooks():
    known = {"basin", "efficiency", "initialisation", "stability", "surrogates", "vit_ablation"}
    assert known <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert _parameters(notebook).source.startswith("QUICK = False")
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # from top to bottom
    outputs = _outputs(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert not [text for output in outputs for text in _texts(output) if MACHINE_PATH.search(text)]
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LONG else ()) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_runs_again(path, tmp_path, monkeypatch):
    """In a folder beside the repository's configs, as notebooks/ is, and leaving nothing there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels' tests set it, slow for training
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "lightning_logs").symlink_to(ROOT / "lightning_logs")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook = nbformat.read(path, as_version=4)
    _parameters(notebook).source = "QUICK = True"
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()  # an error in a cell is raised here
    assert not list(folder.iterdir())

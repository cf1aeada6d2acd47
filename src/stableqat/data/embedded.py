"""The embedded data sets, which need no network and no further files.

The text is English that comes with the running Python: its language reference (`pydoc_data.topics`) and the
docstrings of the standard library, one document per module, read from source with `ast` without importing
anything. The images are scikit-learn's 1,797 handwritten digits of 8x8 pixels. Both are real and small: they
show that training works, not how well. The text depends on the Python version, and so does the name of its
cache.
"""

import ast
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from stableqat.errors import UserError
from stableqat.files import whole_file

#: Mean and standard deviation of the digits' training pixels, scaled to [0, 1].
DIGITS_MEAN, DIGITS_STD = 0.3051, 0.3762
DIGITS_SIZE = 8

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


#: How a user replaces the cache folder `cache_root`.
CACHE_REMEDY = "set $STABLEQAT_CACHE to another folder"


def cache_root() -> Path:
    """The cache folder: `$STABLEQAT_CACHE`, or `stableqat` in the user's cache folder."""
    if folder := os.environ.get("STABLEQAT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stableqat"


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings at and below a node, in the order of the source."""
    if isinstance(node, (ast.Module, *_DOCUMENTED)) and (text := ast.get_docstring(node)):
        yield text
    for child in getattr(node, "body", ()):
        if isinstance(child, (*_DOCUMENTED, ast.If, ast.Try)):
            yield from _docstrings(child)


def stdlib_documents(root: Path | None = None) -> list[str]:
    """The standard library's English: the topics, then one document per module, sorted by path.

    Args:
        root: Folder of the standard library's sources; None takes that of the running Python.

    Raises:
        UserError: If there are no sources (a frozen or stripped Python).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    documents: list[str] = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            continue
        if text := "\n\n".join(_docstrings(tree)):
            documents.append(text)
    topics = root / "pydoc_data" / "topics.py"
    if not documents or not topics.is_file():
        raise UserError(f"{root} lacks the sources of Python's standard library: name your own source")
    tables = (node.value for node in ast.parse(topics.read_bytes()).body if isinstance(node, ast.Assign))
    articles = [text for table in tables for _, text in sorted(ast.literal_eval(table).items())]
    return [inspect.cleandoc(text) for text in articles] + documents


def embedded_text() -> Path:
    """The parquet file of the embedded documents (column `text`), made on first use."""
    import pyarrow
    import pyarrow.parquet

    path = cache_root() / "text" / f"python-{platform.python_version()}.parquet"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"text": stdlib_documents()})
        with whole_file(path) as part:  # if processes race, the file of the last one stays: all are equal
            pyarrow.parquet.write_table(table, part)
    return path


def embedded_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits: pixels (1797, 8, 8) float32 in [0, 1], and classes (1797,) int64."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float32) / 16, digits.target.astype(np.int64)


class DigitsTransform:
    """Standardises a digit and, in training, shifts it by at most one pixel in each direction.

    Args:
        augment: Whether to shift.
    """

    def __init__(self, augment: bool):
        self.augment = augment

    def __call__(self, pixels: np.ndarray, out: torch.Tensor) -> None:
        """Standardises a digit into `out`, shape (1, 8, 8); over the training split, the mean becomes 0."""
        image = torch.from_numpy(pixels)
        if self.augment:
            top, left = torch.randint(3, (2,)).tolist()
            padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
            image = padded[top : top + DIGITS_SIZE, left : left + DIGITS_SIZE]
        out[0] = (image - DIGITS_MEAN) / DIGITS_STD

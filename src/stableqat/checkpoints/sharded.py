"""Sharded checkpoints: folders in which every process wrote its own part of model and optimizer.

The format is torch.distributed.checkpoint's: `.metadata` says which file holds which part of which tensor,
`*.distcp` hold them, and Lightning's `meta.pt` the rest of the checkpoint. torch reads `.metadata` and plain
values by unpickling whatever they say; here only the index's own classes, tensors and plain values are read.
"""

import io
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata as index_classes
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from stableqat.checkpoints.names import INDEX

_NAMES = {
    index_classes.__name__: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    _StorageInfo.__module__: {_StorageInfo.__name__},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class _IndexUnpickler(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _NAMES.get(module, ()):
            raise UnpicklingError(f"{INDEX} names {module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(self._folder)


class _PlainValues(DefaultLoadPlanner):
    """Keeps values that are no tensors by their name in the index."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.values[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def read_index(folder: Path) -> Metadata:
    """Which tensors there are, and where.

    Raises:
        UnpicklingError: If the index is damaged, or names anything that an index has no use for.
    """
    with open(folder / INDEX, "rb") as file:
        index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise UnpicklingError(f"{INDEX} is no index")
    index.storage_meta = index.storage_meta or StorageMeta()
    return index


def read_whole(folder: Path, only: str = "") -> dict[str, Any]:
    """Put a folder's tensors together, as they would be in one file.

    Args:
        folder: The sharded checkpoint.
        only: Read this top-level entry alone.

    Returns:
        Nested entries: `state_dict`, and `optimizer_0` with its states and groups.
    """
    index = read_index(folder)
    entries = index.state_dict_metadata.items()
    wanted = {key: value for key, value in entries if only in ("", index.planner_data[key][0])}
    flat: dict[str, Any] = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        if isinstance(value, TensorStorageMetadata)
        else None
        for key, value in wanted.items()
    }
    planner = _PlainValues()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be here
        dcp.load(flat, storage_reader=_Reader(folder), planner=planner, no_dist=True)
    flat.update(planner.values)
    whole: dict[str, Any] = {}
    for key, value in flat.items():
        _put(whole, index.planner_data[key], value)
    return whole


def load_shards(folder: Path, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Load a folder into a sharded model and its optimizers, on any number of processes."""
    state = get_model_state_dict(model)
    _load({"state_dict": state}, folder)
    set_model_state_dict(model, state)
    for number, optimizer in enumerate(optimizers):
        key = f"optimizer_{number}"
        loaded = _load({key: get_optimizer_state_dict(model, optimizer)}, folder)
        set_optimizer_state_dict(model, optimizer, loaded[key])


def damaged_parts(folder: Path) -> Iterator[str]:
    """Names of files that are missing, cut short, or differ from their checksums."""
    index = read_index(folder)
    for path in sorted({each.relative_path for each in index.storage_data.values()}):
        parts = [each for each in index.storage_data.values() if each.relative_path == path]
        if not (folder / path).is_file():
            yield path
            continue
        with open(folder / path, "rb") as file:
            if not all(_is_whole(file, part) for part in parts):
                yield path


def _is_whole(file: io.BufferedReader, part: _StorageInfo) -> bool:
    file.seek(part.offset)
    content = file.read(part.length)
    if len(content) < part.length:
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    planner = _PlainValues()
    dcp.load(state, storage_reader=_Reader(folder), planner=planner)
    for key, value in planner.values.items():
        _put(state, planner.mappings[key], value)
    return state


def _put(tree: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Set `tree[path[0]][path[1]]...`; lists and dicts on the way are made, in any order of arrival."""
    for key, following in zip(path, [*path[1:], None], strict=True):
        branch = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(tree, list):
            assert isinstance(key, int)
            tree.extend([None] * (key + 1 - len(tree)))
            if following is None or tree[key] is None:
                tree[key] = branch
        elif following is None or key not in tree:
            tree[key] = branch
        tree = tree[key]

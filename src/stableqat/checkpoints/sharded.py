"""Sharded checkpoints: folders in which every process wrote its own part of model and optimizer.

The format is torch.distributed.checkpoint's: `.metadata` says which file holds which part of which tensor,
`*.distcp` hold them, and Lightning's `meta.pt` the rest of the checkpoint. torch reads `.metadata` and plain
values by unpickling whatever they say; here only the index's own classes, tensors and plain values are read.
"""

import io
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata as index_classes
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
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

from stableqat.checkpoints.names import INDEX, REST

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


class _Planner(DefaultLoadPlanner):
    """torch's own, except that it unpickles nothing but tensors and plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


def read_index(folder: Path) -> Metadata:
    """Read which tensors there are, and where they lie.

    Raises:
        UnpicklingError: If the index is damaged, or names anything that an index has no use for.
    """
    with open(folder / INDEX, "rb") as file:
        index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise UnpicklingError(f"{INDEX} is not an index")
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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be here
        dcp.load(flat, storage_reader=_Reader(folder), planner=_Planner(), no_dist=True)
    return unflatten_state_dict(flat, index.planner_data)


def load_shards(folder: Path, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Load a folder into a sharded model and its optimizers, on any number of processes."""
    state: dict[str, Any] = {"state_dict": get_model_state_dict(model)}
    dcp.load(state, storage_reader=_Reader(folder), planner=_Planner())
    set_model_state_dict(model, state["state_dict"])
    for number, optimizer in enumerate(optimizers):
        key = f"optimizer_{number}"
        state = {key: get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner())
        set_optimizer_state_dict(model, optimizer, state[key])


def damaged_files(folder: Path) -> list[str]:
    """Names of the files that are missing, cut short, or differ from their checksums."""
    parts = {
        (each.relative_path, each.offset, each.length) for each in read_index(folder).storage_data.values()
    }
    return sorted({file for file, *part in [*parts, (REST, 0, -1)] if not _is_whole(folder / file, *part)})


def _is_whole(file: Path, offset: int, length: int) -> bool:
    """Whether a zip archive inside a file is there and agrees with its checksums."""
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            content = io.BytesIO(opened.read(length))
        with zipfile.ZipFile(content) as archive:
            return archive.testzip() is None
    except (FileNotFoundError, zipfile.BadZipFile):
        return False

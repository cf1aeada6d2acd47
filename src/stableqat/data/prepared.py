"""A tokenized set, as `stableqat data tokenize` writes it: opened from its memory map, nothing is copied."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.data.output import read_manifest
from stableqat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

#: What its manifest calls a tokenized set.
KIND = "tokenized set"


def prepared_manifest(source: str) -> dict[str, Any] | None:
    """Return the manifest of a tokenized set, or None for any other source.

    Raises:
        UserError: a shard is missing or was cut short.
    """
    folder = Path(source).expanduser()
    manifest = read_manifest(folder)
    if manifest is None or manifest["kind"] != KIND:
        return None
    for shard in (shard for split in manifest["splits"].values() for shard in split["shards"]):
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{path} is missing or not the {shard['bytes']} bytes that were written: copy it again"
            )
    return manifest


def prepared_splits(source: str, manifest: dict[str, Any]) -> dict[str, "Dataset"]:
    """Return the splits of a tokenized set, with a column `input_ids`."""
    from datasets import Dataset, concatenate_datasets

    folder = Path(source).expanduser()
    return {
        split: concatenate_datasets([Dataset.from_file(str(folder / s["file"])) for s in about["shards"]])
        for split, about in manifest["splits"].items()
    }

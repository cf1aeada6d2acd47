"""What `stableqat data` writes to disk: a manifest and shards; and how to open a tokenized set.

A tokenized set is read from its memory map, without copies.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stableqat.data.tokenizer import template_hash, tokenizer_hash
from stableqat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

MANIFEST = "manifest.json"
#: The kinds in manifests: a tokenized set and a sample.
TOKENIZED, SAMPLE = "tokenized set", "sample"
_TYPES: dict[type, str] = {dict: "a mapping", list: "a list", str: "text", int: "a number"}
_AGAIN = "copy it again, or make the set again"
V = TypeVar("V")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that `stableqat data` wrote; None for any other folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and "kind" in manifest else None


@dataclass(frozen=True)
class Shard:
    """A file of a finished output, as its manifest describes it."""

    path: Path
    size: int
    sha256: str

    def check_size(self) -> None:
        """Refuse a file that is missing or was cut short."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            raise UserError(f"{self.path} is missing or does not have its {self.size} bytes: copy it again")

    def check_content(self) -> None:
        """Refuse a file in which a byte has changed; an unchanged file is read only once."""
        self.check_size()
        if _sha256(self.path.resolve(), self.path.stat().st_mtime_ns) != self.sha256:
            raise UserError(f"{self.path} is damaged (its SHA-256 is not the manifest's): {_AGAIN}")


@cache
def _sha256(path: Path, modified: int) -> str:
    """The SHA-256 of a file that was last written at that time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_field(folder: Path, manifest: dict[str, Any], kind: type[V], *keys: str | int) -> V:
    """The value in a folder's manifest under nested keys.

    Raises:
        UserError: If there is none, or it has another type; names the key.
    """
    value: Any = manifest
    try:
        for key in keys:
            value = value[key]
    except (LookupError, TypeError):
        value = None
    if type(value) is not kind or not value:
        reason = f"{'.'.join(map(str, keys))} is not {_TYPES[kind]}"
        raise UserError(f"{folder / MANIFEST} is damaged ({reason}): {_AGAIN}")
    return value


def read_shards(folder: Path, manifest: dict[str, Any]) -> dict[str, list[Shard]]:
    """The shards of each split of a finished output.

    Raises:
        UserError: If the manifest lacks one of their fields; names it.
    """
    found: dict[str, list[Shard]] = {}
    for split in read_field(folder, manifest, dict, "splits"):
        found[split] = []
        for number in range(len(read_field(folder, manifest, list, "splits", split, "shards"))):
            at = "splits", split, "shards", number
            name = Path(read_field(folder, manifest, str, *at, "file")).name
            size = read_field(folder, manifest, int, *at, "bytes")
            found[split].append(Shard(folder / name, size, read_field(folder, manifest, str, *at, "sha256")))
    return found


def prepared_manifest(source: str) -> dict[str, Any] | None:
    """The manifest of a tokenized set; None for any other source.

    Raises:
        UserError: If the manifest is damaged, or a shard is missing or was cut short.
    """
    folder = Path(source).expanduser()
    manifest = read_manifest(folder)
    if manifest is None and folder.is_dir() and next(folder.glob("*.arrow"), None):
        raise UserError(f"{folder} holds Arrow files without {MANIFEST}: copy it again, or name the text")
    if manifest is None or manifest["kind"] != TOKENIZED:
        return None
    read_field(folder, manifest, str, "tokenizer_sha256")
    shards = read_shards(folder, manifest)
    for split in ("train", "validation"):
        read_field(folder, manifest, dict, "splits", split)
    for shard in (shard for some in shards.values() for shard in some):
        shard.check_size()
    return manifest


def check_content(source: str) -> None:
    """Compare the files that `stableqat data` wrote with the SHA-256 in their manifest; skip other sources.

    Raises:
        UserError: If a shard is damaged; names it.
    """
    folder = Path(source).expanduser()
    if (manifest := read_manifest(folder)) is not None and manifest["kind"] in (TOKENIZED, SAMPLE):
        for shard in (shard for some in read_shards(folder, manifest).values() for shard in some):
            shard.check_content()


def made_with_another(manifest: dict[str, Any], tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """What of a tokenizer is not what a tokenized set was made with, or None."""
    if tokenizer_hash(tokenizer) != manifest["tokenizer_sha256"]:
        return "tokenizer"
    template = manifest.get("chat_template_sha256")
    return "chat template" if template not in (None, template_hash(tokenizer)) else None


def prepared_splits(source: str, manifest: dict[str, Any]) -> dict[str, "Dataset"]:
    """The splits of a tokenized set, with a column `input_ids`; conversations have `spans`.

    Raises:
        UserError: If a shard holds something else.
    """
    from datasets import Dataset, concatenate_datasets

    def rows(shard: Shard) -> "Dataset":
        try:
            opened = Dataset.from_file(str(shard.path))
            if all(feature.feature.dtype == "int32" for feature in opened.features.values()):
                return opened
        except Exception as error:  # pyarrow and `datasets` raise many kinds
            raise UserError(f"{shard.path} cannot be read as rows of tokens: copy it again") from error
        raise UserError(f"{shard.path} does not hold rows of tokens: tokenize again")

    shards = read_shards(Path(source).expanduser(), manifest)
    return {split: concatenate_datasets([rows(shard) for shard in some]) for split, some in shards.items()}

"""What `stableqat data` wrote, checked and opened: a tokenized set from its memory map, nothing is copied."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.data.prepare.output import MANIFEST, Shard, read_field, read_manifest, read_shards
from stableqat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

#: What manifests call a tokenized set and a sample.
KIND, SAMPLE = "tokenized set", "sample"


def prepared_manifest(source: str) -> dict[str, Any] | None:
    """Return the manifest of a tokenized set, or None for any other source.

    Raises:
        UserError: the manifest is damaged, or a shard is missing or was cut short.
    """
    folder = Path(source).expanduser()
    manifest = read_manifest(folder)
    if manifest is None and folder.is_dir() and next(folder.glob("*.arrow"), None):
        raise UserError(
            f"{folder} holds Arrow files without the manifest of `stableqat data tokenize`: copy its "
            f"{MANIFEST} again, or give the text"
        )
    if manifest is None or manifest["kind"] != KIND:
        return None
    read_field(folder, manifest, str, "tokenizer_sha256")
    shards = read_shards(folder, manifest)
    for split in ("train", "validation"):
        read_field(folder, manifest, dict, "splits", split)
    for shard in (shard for some in shards.values() for shard in some):
        shard.check_size()
    return manifest


def check_content(source: str) -> None:
    """Compare the files that `stableqat data` wrote with the manifest's SHA-256; of other sources, none.

    Raises:
        UserError: a shard is damaged; names it.
    """
    folder = Path(source).expanduser()
    if (manifest := read_manifest(folder)) is not None and manifest["kind"] in (KIND, SAMPLE):
        for shard in (shard for some in read_shards(folder, manifest).values() for shard in some):
            shard.check_content()


def prepared_splits(source: str, manifest: dict[str, Any]) -> dict[str, "Dataset"]:
    """Return the splits of a tokenized set, with a column `input_ids`.

    Raises:
        UserError: a shard holds something else.
    """
    from datasets import Dataset, concatenate_datasets

    def rows(shard: Shard) -> "Dataset":
        try:
            opened = Dataset.from_file(str(shard.path))
            if opened.features["input_ids"].feature.dtype == "int32":
                return opened
        except Exception as error:  # pyarrow's and `datasets`' are of many classes
            raise UserError(f"{shard.path} can't be read as rows of tokens: copy it again") from error
        raise UserError(f"{shard.path} holds no rows of tokens: tokenize again")

    shards = read_shards(Path(source).expanduser(), manifest)
    return {split: concatenate_datasets([rows(shard) for shard in some]) for split, some in shards.items()}

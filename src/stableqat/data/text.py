"""Text and conversations for language models: one source or a mixture, as rows of `block_size` tokens.

Raw text is tokenized once, with EOS after each document; conversations are rendered by the tokenizer's chat
template; a tokenized set is read as it is. An epoch is all of one source, as much as the scarcest source of a
mixture allows, or a budget of tokens. The sources of a mixture take turns, so that their ratio holds at every
moment of training and not only at its end.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from stableqat.data.budget import Budget
from stableqat.data.chat import Format, Records
from stableqat.data.conversation_rows import ConversationRows, LossOn, lengths_of, report, rows_for
from stableqat.data.datamodule import DataModule, Rows
from stableqat.data.documents import Documents
from stableqat.data.embedded import CACHE_REMEDY, cache_root, embedded_text
from stableqat.data.encoder import ConversationEncoder, DocumentEncoder
from stableqat.data.holdout import check_share
from stableqat.data.mixture import Mixture
from stableqat.data.order import TrainingLoader
from stableqat.data.prepared import check_content, made_with_another, prepared_manifest, prepared_splits
from stableqat.data.source import TEXT_FORMATS, caching, local_files
from stableqat.data.text_rows import MixedRows, PackedRows
from stableqat.data.tokenizer import (
    BPE_MIN_VOCAB,
    EOS,
    check_tokenizer,
    load_tokenizer,
    save_tokenizer,
    token_rows,
    train_bpe,
)
from stableqat.errors import UserError, check_known, check_range
from stableqat.files import whole_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

BLOCK_SIZE, BATCH_SIZE = 128, 16
Packed = PackedRows | ConversationRows
#: More text than this hardly changes a BPE's merges.
_BPE_MAX_BYTES = 100_000_000


class TextDataModule(DataModule):
    """Rows of tokens for language models: `input_ids` and (unshifted) `labels`, (batch, block_size).

    Of texts, each token has a label. Of conversations, those that the assistant writes have one, its
    end-of-turn token included, and -100 stands elsewhere; `position_ids` keep those of a row apart.

    Args:
        source: A file or folder of jsonl, json, parquet or txt (.zst, .gz, .bz2, .xz too), or a Hub name;
            null takes the embedded text. In a folder, files whose names start with train, validation (valid,
            val, dev) or test, or folders with these names, make the splits. A txt file is one document. A
            folder that `data tokenize` wrote is read as it is, with its tokenizer and any block_size. A
            mapping such as {data/slim: 1, data/edu: 1} mixes sources at these ratios of tokens; its
            validation split holds all of theirs.
        tokens: Training tokens per epoch, such as 300000, 20M or 1.5B; null takes all or, of a mixture, as
            many as its scarcest source allows.
        tokens_per_step: Declared tokens per optimizer step, over all processes and accumulated batches; a run
            that takes another number is refused. null declares nothing.
        repeat: Let a source with fewer tokens than its share of the budget start over, and let a run take the
            budget more than once.
        name: Configuration of a Hub data set.
        tokenizer: A Hub name, a folder or a tokenizer.json. null takes that of a tokenized source or, on the
            command line, of what the model starts from, and otherwise trains a byte-level BPE on the train
            splits, taken evenly.
        vocab_size: Entries of that BPE; not used with a tokenizer.
        text_column: The column that holds the text.
        format: What the records are: text, messages (role and content), prompt (and completion), or
            instruction (input and output). null tells by their columns.
        loss_on: The tokens of conversations that have labels: assistant, or all.
        packing: Whether a row holds several conversations, or one.
        attend_across: Let a conversation see those before it in its row. Texts always do: their rows are cut
            from one run of tokens.
        block_size: Tokens per row; the last incomplete row of a split of texts is dropped, and longer
            conversations are cut. On the command line, null takes the model's positions, at most 2,048 and
            fewer for a small source, but enough for 99% of its conversations; elsewhere it is 128.
        batch_size: Rows per step and process. On the command line, null takes what fits the model, the source
            and the device; elsewhere it is 16.
        validation_fraction: Share of the documents to hold out, whole and by their hashes, if a source has no
            validation split; of a single document, its end.
        num_workers: Processes that load batches in advance; 0 loads in the training process.
        seed: Decides the order; null takes the run's seed (seed_everything).
        cache_dir: Folder for prepared data and trained tokenizers; null takes the default folders of
            `datasets` and of stableqat ($STABLEQAT_CACHE).

    Raises:
        UserError: If a value is out of range, a file is missing, empty or truncated, or tokenizers differ.
    """

    def __init__(
        self,
        source: dict[str, float] | str | None = None,
        *,
        tokens: int | str | None = None,
        tokens_per_step: int | str | None = None,
        repeat: bool = False,
        name: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 2048,
        text_column: str = "text",
        format: Format | None = None,
        loss_on: LossOn = "assistant",
        packing: bool = True,
        attend_across: bool = False,
        block_size: int | None = BLOCK_SIZE,
        batch_size: int | None = BATCH_SIZE,
        validation_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int | None = None,
        cache_dir: str | None = None,
    ):
        block_size = BLOCK_SIZE if block_size is None else block_size
        super().__init__(
            batch_size=BATCH_SIZE if batch_size is None else batch_size, num_workers=num_workers, seed=seed
        )
        if block_size < 2:
            raise UserError(f"block_size {block_size} must be at least 2: a token is predicted from another")
        if tokenizer is None:
            check_range("vocab_size", vocab_size, BPE_MIN_VOCAB)  # 256 bytes and the end of a document
        check_share(validation_fraction)
        check_known("loss_on", loss_on, get_args(LossOn))
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        self.tokens = None if tokens is None else Budget(tokens)
        if self.tokens is not None:
            self.tokens.rows(block_size)  # at least one
        if repeat and tokens is None:
            raise UserError("repeat true needs a number of tokens to stop at: set tokens")
        self.source = source
        self.ratios = _ratios(source)
        if len(self.ratios) > 1 and name is not None:
            fault = f"is the configuration of one Hub data set, and source mixes {len(self.ratios)}"
            raise UserError(f"name {name} {fault}: draw from it first with data sample --name")
        self._manifests: dict[str, dict[str, Any]] = {}
        for each in self.ratios:
            if (manifest := prepared_manifest(each)) is None:
                local_files(each, TEXT_FORMATS)
                continue
            first = next(iter(self._manifests), each)
            self._manifests[each] = manifest
            if manifest["tokenizer_sha256"] != self._manifests[first]["tokenizer_sha256"]:
                fault = f"was made with another tokenizer than {first}, and a mixture needs one"
                raise UserError(f"{each} {fault}: tokenize it again with --tokenizer {first}/tokenizer")
        if self._manifests and tokenizer is None:
            tokenizer = f"{next(iter(self._manifests))}/tokenizer"
        self.tokens_per_step = None if tokens_per_step is None else Budget(tokens_per_step, "tokens_per_step")
        self.repeat = repeat
        self.name = name
        self.tokenizer_source = tokenizer
        self.text_column = text_column if source is not None else "text"
        self.format = format
        self.loss_on, self.packing, self.attend_across = loss_on, packing, attend_across
        self.block_size = block_size
        self.validation_fraction = validation_fraction
        self.cache_dir = cache_dir
        self._bpe_size = vocab_size

    @cached_property
    def _documents(self) -> dict[str, Documents]:
        """The sources of raw text."""
        with caching(cache_root(), CACHE_REMEDY):
            sources = self.ratios or [str(embedded_text())]
        options = self.name, self.text_column, self.validation_fraction, self.cache_dir, self.format
        return {each: Documents(each, *options) for each in sources if each not in self._manifests}

    def _training_texts(self) -> Iterator[str]:
        """Yield the documents that the BPE is trained on, an equal share from each source."""
        for documents in self._documents.values():
            yield from documents.training_texts(_BPE_MAX_BYTES // len(self._documents))

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The named tokenizer, that of the sources, or the BPE, which is trained on first use and cached."""
        if self.tokenizer_source is not None:
            return load_tokenizer(self.tokenizer_source)
        for source, documents in self._documents.items():
            if documents.records.are_conversations:
                raise UserError(
                    f"tokenizer: {source} holds {documents.records.words}, which train no tokenizer: name "
                    "that of a model"
                )
        texts = " ".join(documents.fingerprint for documents in self._documents.values())
        what = f"{texts} {self.text_column} {EOS}"
        digest = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
        root = Path(self.cache_dir).expanduser() if self.cache_dir else cache_root()
        folder = root / "tokenizers" / f"bpe-{self._bpe_size}-{digest}"
        if not folder.is_dir():
            bpe = train_bpe(self._training_texts(), self._bpe_size)
            remedy = "set data.cache_dir to another folder" if self.cache_dir else CACHE_REMEDY
            with caching(root, remedy), suppress(FileExistsError), whole_folder(folder) as part:
                save_tokenizer(bpe, part)  # unless another process was first
        return load_tokenizer(str(folder))

    @property
    def vocab_size(self) -> int:
        """The number of embedding rows that the tokens need: the entries of the BPE or of the tokenizer."""
        return self._bpe_size if self.tokenizer_source is None else token_rows(self.tokenizer)

    @property
    def eos_token_id(self) -> int:
        """The token that ends each document."""
        return self.tokenizer.eos_token_id

    def _tokenized(self, source: str) -> tuple[Records, dict[str, "Dataset"]]:
        """What a source holds, and its splits with `input_ids` and, of conversations, `spans`."""
        if (manifest := self._manifests.get(source)) is None:
            documents = self._documents[source]
            tokenizer, records = self.tokenizer, documents.records
            if not records.are_conversations:
                return records, documents.tokenized(DocumentEncoder.of(tokenizer))
            spans = self.loss_on == "assistant"
            return records, documents.tokenized(ConversationEncoder.of(tokenizer, records, spans=spans))
        if other := made_with_another(manifest, self.tokenizer):
            raise UserError(
                f"{source} was made with another {other} than {self.tokenizer_source}: "
                "leave tokenizer out, or tokenize again"
            )
        return Records(manifest["request"].get("format", "text")), prepared_splits(source, manifest)

    def rows_for_conversations(self) -> int | None:
        """The block size that keeps nearly all raw conversations whole; None if there are none."""
        chats = [each for each, raw in self._documents.items() if raw.records.are_conversations]
        splits = [split for each in chats for split in self._tokenized(each)[1].values()]
        return rows_for(np.concatenate([*map(lengths_of, splits)])) if splits else None

    @cached_property
    def _packed(self) -> dict[str, dict[str, Packed]]:
        """The rows of each source, by split."""
        packed: dict[str, dict[str, Packed]] = {}
        for source in self.ratios or self._documents:
            records, splits = self._tokenized(source)
            if not (records.are_conversations or self.packing):
                raise UserError(f"packing: false needs conversations, and {self._called(source)} holds texts")
            packed[source] = {split: self._rows(records, run) for split, run in splits.items()}
            for split, rows in packed[source].items():
                if not len(rows):
                    raise UserError(f"the {split} split of {self._called(source)} has {rows.lack}")
            if chats := [each for each in packed[source].values() if isinstance(each, ConversationRows)]:
                report(source, records, chats)
        return packed

    def _rows(self, records: Records, run: "Dataset") -> Packed:
        if not records.are_conversations:
            return PackedRows(run, self.block_size)
        return ConversationRows(
            run,
            self.block_size,
            self.eos_token_id,
            loss_on=self.loss_on,
            packing=self.packing,
            attend_across=self.attend_across,
        )

    def _called(self, source: str) -> str:
        return source if self.ratios else "the embedded text"

    @cached_property
    def mixture(self) -> Mixture:
        """How an epoch draws from the sources.

        Raises:
            UserError: If the budget is larger than the data, and `repeat` is false.
        """
        rows = [len(splits["train"]) for splits in self._packed.values()]
        mixture = Mixture(rows, list(self.ratios.values()) or [1])
        if self.tokens is None:
            return mixture
        budget = Mixture(rows, mixture.shares, self.tokens.rows(self.block_size))
        if budget.size > mixture.size and not self.repeat:
            asked = zip(self._packed, budget.counts, rows, strict=True)
            source, share, there = max(asked, key=lambda each: each[1] / each[2])
            of = "" if len(rows) == 1 else f" of its share of {share * self.block_size}"
            raise self.tokens.more_than(
                f"the data allows without repetition, {mixture.size * self.block_size} "
                f"({self._called(source)} has {there * self.block_size}{of})",
                "set repeat: true",
            )
        return budget

    def describe(self) -> dict[str, Any]:
        """What a run takes of the data, for its record."""
        step, trainer = math.prod(self._step().values()), self.trainer
        described = {**super().describe(), "tokens_per_step": step}
        if trainer is None or (steps := trainer.estimated_stepping_batches) == math.inf:
            return described
        accumulated, batches = trainer.accumulate_grad_batches, int(trainer.num_training_batches)
        # the last step of an epoch may be shorter
        epochs, rest = divmod(int(steps), math.ceil(batches / accumulated))
        taken = epochs * batches + rest * accumulated
        return {**described, "training_tokens": taken * step // accumulated}

    def _step(self) -> dict[str, int]:
        """The settings whose product is the tokens of a step."""
        return {
            "batch_size": self.batch_size,
            "block_size": self.block_size,
            "processes": self._share()["world_size"],
            "accumulate_grad_batches": getattr(self.trainer, "accumulate_grad_batches", 1),
        }

    def train_dataloader(self) -> TrainingLoader:
        """The loader of the training stream, if the run takes the tokens that it declares.

        Raises:
            UserError: If a step takes another number of tokens, or the run more than the budget; see also
                `DataModule`.
        """
        step = self._step()
        if self.tokens_per_step is not None:
            self.tokens_per_step.check_step(step)
        loader = super().train_dataloader()
        if self.tokens is not None and not self.repeat and self.trainer is not None:
            self.tokens.check_run(self.trainer, math.prod(step.values()), len(loader))
        return loader

    def prepare_data(self) -> None:
        """Check what `stableqat data` wrote, and fill the caches, on one process per machine."""
        for source in self.ratios:
            check_content(source)
        super().prepare_data()

    def load(self) -> dict[str, Rows]:
        """The splits as rows of tokens.

        Raises:
            UserError: If a split has fewer tokens than one row, or the data has fewer than the budget.
        """
        self.mixture  # noqa: B018
        first, *others = self._packed.values()
        if not others:
            return dict(first)
        common = [split for split in first if all(split in splits for splits in others)]
        return {
            split: MixedRows([splits[split] for splits in (first, *others)], spread=split != "train")
            for split in common
        }


def _ratios(source: dict[str, float] | str | None) -> dict[str, float]:
    """The sources and their ratios; none for the embedded text."""
    if source is None:
        return {}
    if isinstance(source, str):
        if source.startswith("{"):
            raise UserError(f"source {source} must give each source a number, such as {{data/slim: 1}}")
        return {source: 1}
    if not source:
        raise UserError("source {} is empty: name sources and their ratios")
    places: dict[object, str] = {}
    for each, ratio in source.items():
        if not 0 < ratio < math.inf:
            raise UserError(f"source {each}: its ratio {ratio} must be a number above 0")
        path = Path(each).expanduser()
        stat = path.stat() if path.exists() else None
        first = places.setdefault((stat.st_dev, stat.st_ino) if stat else each, each)
        if first != each:
            raise UserError(f"source names the same data twice, as {first} and as {each}: name it once")
    return {str(each): ratio for each, ratio in source.items()}

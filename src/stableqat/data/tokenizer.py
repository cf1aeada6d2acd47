"""Tokenizers: a byte-level BPE trained on the user's own text, or an existing one, from disk or the Hub.

Byte-level means that every text can be encoded and decodes exactly; no token is unknown. A small vocabulary
keeps the embeddings of a small model small, at the price of more tokens per word.
"""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.errors import UserError, first_line
from stableqat.files import as_it_stands, is_missing, whole_folder, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

EOS = "<|endoftext|>"
#: Spellings of EOS to look for in a bare tokenizer.json, which does not name it.
_EOS_SPELLINGS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_GAVE_UP, _TRIAL_SECONDS = 3, 60
#: Encodes long runs; the letters after them keep a match from being given up early for want of a letter.
_TRIAL = f"""
import sys
from tokenizers import Tokenizer

backend = Tokenizer.from_str(sys.stdin.buffer.read().decode())
letters = [chr(number) for number in (10, *range(32, 127), 0xE9, 0x4E2D)]
try:
    for run in [*letters, "ab", "a ", "1,", chr(13) + chr(10), " " + chr(10), "Aa", "x1"]:
        for end in ("", "!", "a", chr(10), "~ " + "".join(letters)):
            backend.encode(run * 400 + end)
except BaseException:
    sys.exit({_GAVE_UP})
"""
#: The 256 bytes and EOS.
BPE_MIN_VOCAB = 257


def train_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of at most `vocab_size` entries, including EOS, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # it would write to stdout
    )
    log.info("training a byte-level BPE of %d entries", vocab_size)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path | str) -> None:
    """Write a tokenizer's folder.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception for a full disk
        raise error if isinstance(error, OSError) else OSError(str(error)) from error


def check_tokenizer(source: str) -> None:
    """Refuse what can only be a local path and does not exist."""
    if is_missing(source) or (source.endswith(".json") and not Path(source).expanduser().exists()):
        raise UserError(f"no such tokenizer file or folder: {source}{as_it_stands(source)}")


def tokenizer_json(tokenizer: "PreTrainedTokenizerFast") -> str:
    """What decides a tokenizer's output, as JSON, without its present padding and truncation."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str()


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The SHA-256 of what decides a tokenizer's output, and of the EOS token."""
    what = f"{tokenizer.eos_token_id} {tokenizer_json(tokenizer)}"
    return hashlib.sha256(what.encode()).hexdigest()


def template_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The SHA-256 of a tokenizer's chat template, or of its lack."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()


def keep_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a tokenizer into a new folder, which appears once it is complete.

    Raises:
        UserError: If it cannot be written.
    """
    with writing(f"{folder}: the tokenizer", "make room"), whole_folder(folder) as part:
        save_tokenizer(tokenizer, part)


def token_rows(tokenizer: "PreTrainedTokenizerFast") -> int:
    """How many rows of an embedding the ids of a tokenizer need; ids may leave gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", rows: int, source: str) -> None:
    """Refuse a tokenizer with more entries than a model's embedding has rows.

    Args:
        tokenizer: The tokenizer.
        rows: Rows of the embedding.
        source: Where the tokenizer comes from.

    Raises:
        UserError: Naming both numbers.
    """
    if (entries := token_rows(tokenizer)) > rows:
        fault = f"that of {source} has {entries} entries, more than the model's {rows}"
        raise UserError(f"tokenizer: {fault}; take the one that the model was trained with")


def clash(tokenizer: "PreTrainedTokenizerFast", own: "PreTrainedTokenizerFast") -> str | None:
    """Why a tokenizer cannot replace a model's own; None if it can.

    Ordinary tokens may differ, at the price of a higher loss. A special token with another id, or with the id
    of another token, would begin and end documents with what means something else to the model.

    Args:
        tokenizer: The one to use.
        own: The one that the model was trained with.
    """
    ids = own.get_vocab()
    tokens = {number: token for token, number in ids.items()}
    for token, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        if token in ids and ids[token] != number:
            return f"{token} is token {number} here and {ids[token]} in the model's tokenizer"
        if tokens.get(number, token) != token:
            return f"token {number} is {token} here and {tokens[number]} in the model's tokenizer"
    return None


@lru_cache(maxsize=8)
def _is_patient(tokenizer: str) -> bool:
    """Whether the regular expressions of a tokenizer (as JSON) finish quickly on long runs of one character.

    It tries them in a separate process, because this one can catch neither a timeout nor a panic in Rust.
    """
    if '"Regex"' not in tokenizer:
        return True
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _TRIAL],
            input=tokenizer.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    return tried.returncode != _GAVE_UP


def _is_plain(config: Path) -> bool:
    """Whether a folder's tokenizer needs no class of a model's; AutoTokenizer imports torch to find out."""
    named = json.loads(config.read_text()).get("tokenizer_class")
    return named in ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(source: str) -> "PreTrainedTokenizerFast":
    """The tokenizer of a Hub name, a local folder or a tokenizer.json.

    Raises:
        UserError: If it is not found or out of reach, is not a fast one, or has no EOS token.
    """
    from transformers import PreTrainedTokenizerFast

    check_tokenizer(source)
    path = Path(source).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    configured = (file.parent / "tokenizer_config.json").is_file()
    try:
        if file.is_file() and not configured:
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(file))
            tokenizer.eos_token = next((eos for eos in _EOS_SPELLINGS if eos in tokenizer.get_vocab()), None)
        elif file.is_file() and _is_plain(file.parent / "tokenizer_config.json"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(file.parent))
        else:
            from transformers import AutoTokenizer

            name = str(file.parent) if file.is_file() else source
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        if path.is_dir() and not file.exists():
            raise UserError(f"tokenizer: {source} holds none; name a tokenizer's folder or file") from error
        fault = f"cannot be loaded from disk or the Hub ({first_line(error)})"
        raise UserError(f"tokenizer {source} {fault}: check it") from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {source} has no fast version (tokenizer.json): choose another")
    if not _is_patient(tokenizer.backend_tokenizer.to_str()):
        fault = "a regular expression that takes too long on long runs of one character"
        raise UserError(f"tokenizer {source} has {fault}: choose another")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {source} has no EOS token: set eos_token in its tokenizer_config.json")
    return tokenizer

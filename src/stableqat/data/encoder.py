"""How documents become tokens: the same way in training, in prepared sets and in evaluation.

Each document is encoded on its own, without special tokens, padding or truncation, and ends in EOS. Half of a
surrogate pair, which JSON can hold and no tokenizer takes, becomes a question mark.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from stableqat.data.tokenizer import tokenizer_json
from stableqat.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@lru_cache(maxsize=1)
def _backend(tokenizer: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer)


@dataclass(frozen=True)
class DocumentEncoder:
    """Encodes documents; plain data, so that processes take it and `datasets` knows if its cache is valid.

    Args:
        tokenizer: The tokenizer as JSON, see `tokenizer_json`.
        eos: The token that ends each document.
    """

    tokenizer: str
    eos: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> Self:
        """The encoder of a tokenizer."""
        return cls(tokenizer_json(tokenizer), tokenizer.eos_token_id)

    def __call__(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The tokens of each document, int32.

        Raises:
            UserError: If a regular expression of the tokenizer gives up.
        """
        valid = [text.encode("utf-8", "replace").decode() for text in texts]
        try:
            encoded = _backend(self.tokenizer).encode_batch_fast(valid, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a panic of Rust's; its class is not public
                raise
            reason = f"the tokenizer cannot encode a document ({first_line(error)})"
            raise UserError(f"{reason}: choose another tokenizer") from error
        return [np.array([*each.ids, self.eos], np.int32) for each in encoded]

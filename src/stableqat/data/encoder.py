"""How documents become tokens: the same way in training, in prepared sets and in evaluation.

A text is encoded by itself, without special tokens, padding or truncation, and ended by EOS. A conversation
is rendered by the tokenizer's chat template and encoded as it is; without a template, a prompt and a
completion are joined, and ended by EOS. With a conversation's tokens come the spans that the assistant
writes: the tokens that hold any of its characters. Half of a surrogate pair, which JSON can name and no
tokenizer takes, becomes a question mark.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from stableqat.data.chat import BadRecordError, Records
from stableqat.data.template import ChatTemplate
from stableqat.data.tokenizer import tokenizer_json
from stableqat.errors import UserError, first_line

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerFast

#: Between a prompt and its completion where no template joins them.
JOINT = "\n"


@lru_cache(maxsize=1)
def _backend(tokenizer: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer)


def _encoded(tokenizer: str, texts: Iterable[str], *, offsets: bool = False) -> list[Any]:
    """The encodings of texts, by a tokenizer as JSON."""
    valid = [text.encode("utf-8", "replace").decode() for text in texts]
    backend = _backend(tokenizer)
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        return encode(valid, add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what Rust's panics become; its class is not public
            raise
        raise UserError(
            f"the tokenizer cannot encode a document ({first_line(error)}): choose another tokenizer"
        ) from error


@dataclass(frozen=True)
class DocumentEncoder:
    """Encodes texts; plain data, so that processes take it and `datasets` can tell if its cache holds.

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
        encoded = _encoded(self.tokenizer, texts)
        return [np.array([*each.ids, self.eos], np.int32) for each in encoded]

    def columns(self, documents: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """The tokens of documents, as a column."""
        return {"input_ids": self(documents)}


@dataclass(frozen=True)
class ConversationEncoder:
    """Encodes conversations, as JSON; plain data like `DocumentEncoder`.

    Args:
        tokenizer: As JSON, without what may trim the places of its tokens.
        eos: The token that ends a completion where there is no template.
        template: Renders the conversations; None joins prompt and completion.
        spans: Find what the assistant writes.
    """

    tokenizer: str
    eos: int
    template: ChatTemplate | None
    spans: bool = True

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", records: Records, *, spans: bool = True) -> Self:
        """The encoder of a tokenizer.

        Args:
            tokenizer: The tokenizer, with its chat template.
            records: What there is to encode.
            spans: Find what the assistant writes.

        Raises:
            UserError: If messages need a chat template, and the tokenizer has none.
        """
        backend = json.loads(tokenizer_json(tokenizer)) | {"post_processor": None}
        template = None
        if tokenizer.chat_template is not None:
            try:
                source = tokenizer.get_chat_template()
            except ValueError as error:  # several, and none is the default
                raise UserError(
                    f"the tokenizer's chat template cannot be chosen ({first_line(error)})"
                ) from error
            names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
            special = [token["content"] for token in backend["added_tokens"] if token["special"]]
            template = ChatTemplate(source, tuple(sorted(names.items())), tuple(special))
        elif records.format == "messages":
            raise UserError(
                f"the tokenizer has no chat template, which {records.words} need: choose the tokenizer of a "
                "model that chats, or give prompt and completion"
            )
        return cls(json.dumps(backend), tokenizer.eos_token_id, template, spans)

    def columns(self, documents: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """The tokens of conversations, and the spans [start, stop, start, ...) of the assistant's.

        Raises:
            BadRecordError: If the template refuses one, or does not tell what the assistant writes.
        """
        texts, parts = [], []
        for index, document in enumerate(documents):
            try:
                text, spans = self._rendered(**json.loads(document))
            except ValueError as error:
                raise BadRecordError(index, str(error)) from error
            texts.append(text)
            parts.append(spans)
        found: dict[str, list[np.ndarray]] = {"input_ids": [], "spans": []}
        for encoding, spans in zip(_encoded(self.tokenizer, texts, offsets=True), parts, strict=True):
            tokens, places = encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)
            if self.template is None:
                tokens = [*tokens, self.eos]
                places = np.append(places, [[spans[-1][1] - 1, spans[-1][1]]], axis=0)
            found["input_ids"].append(np.array(tokens, np.int32))
            found["spans"].append(_tokens_of(spans if self.spans else [], places))
        return found

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        if self.template is not None:
            return self.template.rendered(messages, tools, spans=self.spans)
        prompt, completion = (message["content"] for message in messages)
        if not (prompt[-1].isspace() or completion[0].isspace()):
            prompt += JOINT
        return prompt + completion, [(len(prompt), len(prompt + completion))]


Encoder = DocumentEncoder | ConversationEncoder


def _tokens_of(spans: list[tuple[int, int]], places: np.ndarray) -> np.ndarray:
    """Spans of characters as spans of tokens, [start, stop, start, ...), int32.

    Args:
        spans: [start, stop) of the characters.
        places: [start, stop) of each token's characters, shape (n, 2).
    """
    starts, stops = places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)
    found: list[int] = []
    for start, stop in spans:
        inside = np.flatnonzero((starts < stop) & (stops > start))
        if len(inside):
            found += [int(inside[0]), int(inside[-1]) + 1]
    return np.array(found, np.int32)


def token_features(*, conversations: bool) -> "Features":
    """The columns of encoded documents, as `datasets` describes them."""
    from datasets import Features, List, Value

    names = ("input_ids", "spans") if conversations else ("input_ids",)
    return Features({name: List(Value("int32")) for name in names})

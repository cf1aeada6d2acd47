"""What the records of a source are: texts, or conversations in one of the field's formats.

`messages` holds the turns of a chat, each with a role and a content; `prompt` and `completion`, or
`instruction`, `input` and `output`, are one turn of the user and one of the assistant. Each record becomes
one string, its document: the text as it is, or the conversation as JSON. Validation, caches and processes
look at documents alone.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from stableqat.data.source import listed, wrong_column
from stableqat.errors import UserError, check_known

Format = Literal["text", "messages", "prompt", "instruction"]
Role = Literal["system", "user", "assistant", "tool"]
#: Between an instruction and its input.
SEPARATOR = "\n\n"
#: The columns that make a format, and those that it may have.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {"messages": ("tools",), "instruction": ("input",)}
_WORDS = {
    "text": "text",
    "messages": "chat messages",
    "prompt": "prompts and completions",
    "instruction": "instructions and outputs",
}
#: The keys of a message that chat templates read.
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


class BadRecordError(ValueError):
    """A record that is not what its source holds.

    Args:
        index: Its number among the records at hand.
        reason: What is wrong, and what to do.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(index, reason)
        self.index, self.reason = index, reason


@contextmanager
def numbered(indices: Sequence[int]) -> Iterator[None]:
    """Number a broken record by where it comes from.

    Args:
        indices: The number of each record at hand.
    """
    try:
        yield
    except BadRecordError as error:
        raise BadRecordError(indices[error.index], error.reason) from error


@dataclass(frozen=True)
class Records:
    """Turns the records of a source into documents.

    Args:
        format: What they are.
        text_column: The column that holds the text.
    """

    format: Format
    text_column: str = "text"

    @property
    def are_conversations(self) -> bool:
        """Whether they have turns."""
        return self.format != "text"

    @property
    def words(self) -> str:
        """The format, as a user calls it."""
        return _WORDS[self.format]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that make a record."""
        return _COLUMNS.get(self.format, (self.text_column,))

    @property
    def all_columns(self) -> tuple[str, ...]:
        """The columns that documents are made from, optional ones included."""
        return (*self.columns, *_OPTIONAL.get(self.format, ()))

    def read_from(self, columns: Iterable[str]) -> list[str]:
        """Those of a source's columns that documents are made from."""
        return [column for column in columns if column in self.all_columns]

    def document(self, fields: Mapping[str, Any]) -> str:
        """A record's document; that of an empty text is "".

        Raises:
            ValueError: If the record is broken; says how, and what to do.
        """
        if self.format == "text":
            return fields.get(self.text_column) or ""
        if self.format == "messages":
            messages = _messages(fields.get("messages"))
        else:
            request, answer = (_text(fields, column) for column in self.columns)
            if extra := fields.get("input") if self.format == "instruction" else None:
                if not isinstance(extra, str):
                    raise ValueError("input is not text: write it as text or leave it out")
                request += SEPARATOR + extra
            messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        conversation = {"messages": messages}
        if self.format == "messages" and (tools := fields.get("tools")):
            conversation["tools"] = _tools(tools)
        return json.dumps(_without_nulls(conversation), ensure_ascii=False, sort_keys=True)

    def documents(self, batch: Mapping[str, Sequence[Any]]) -> list[str]:
        """The documents of records that lie column by column.

        Raises:
            BadRecordError: If one of them is broken.
        """
        columns = self.read_from(batch)
        found = []
        for index, values in enumerate(zip(*(batch[column] for column in columns), strict=True)):
            try:
                found.append(self.document(dict(zip(columns, values, strict=True))))
            except ValueError as error:
                raise BadRecordError(index, str(error)) from error
        return found


def recognise(where: str, columns: dict[str, bool], text_column: str, asked: Format | None = None) -> Records:
    """Tell by their columns what records are.

    Args:
        where: The file or the source.
        columns: Each column, and whether it holds text.
        text_column: The column of texts; naming one other than text asks for texts.
        asked: The format that the user names.

    Raises:
        UserError: If no format fits, several do, or the one that is asked for does not.
    """
    if asked is not None:
        check_known("format", asked, get_args(Format))
    elif text_column != "text":
        asked = "text"
    fitting = [*(["text"] if columns.get(text_column) else []), *conversations_in(columns)]
    if asked is None and len(fitting) > 1:
        kinds = " and ".join(_WORDS[name] for name in fitting)
        raise UserError(f"{where} holds {kinds}: keep one of them, or set format to {' or '.join(fitting)}")
    found = asked or (fitting[0] if fitting else "text")
    if found in fitting:
        return Records(found, text_column)  # type: ignore[arg-type]
    if found == "text":
        raise wrong_column(where, text_column, columns)
    lost = next(column for column in _COLUMNS[found] if column not in columns)
    raise UserError(
        f"{where} has no column {lost} (it has {listed(columns)}), which {_WORDS[found]} need: "
        "set another format"
    )


def conversations_in(columns: Collection[str]) -> list[str]:
    """The formats of conversations that columns make."""
    return [name for name, needed in _COLUMNS.items() if set(columns) >= set(needed)]


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise ValueError("messages is not a list: give one of mappings with role and content")
    if not messages:
        raise ValueError("messages is empty: remove the conversation")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is not a mapping: give it role and content")
        role, content = message.get("role"), message.get("content")
        if role is None:
            raise ValueError(f"message {number} has no role: give it one of {', '.join(get_args(Role))}")
        if role not in get_args(Role):
            known = ", ".join(get_args(Role))
            raise ValueError(f"message {number} has the unknown role {role!r}: use one of {known}")
        calls = role == "assistant" and bool(message.get("tool_calls"))
        if not (isinstance(content, str) or (calls and content is None)):
            kind = "no content" if content is None else "a content that is not text"
            raise ValueError(f"message {number} has {kind}: write it as text")
        if role == "assistant" and not calls and not (content or "").strip():
            raise ValueError(
                f"message {number}, the assistant's, is empty: fill it or remove the conversation"
            )
    return [{key: message[key] for key in _KEYS if key in message} for message in messages]


def _text(fields: Mapping[str, Any], column: str) -> str:
    value = fields.get(column)
    if isinstance(value, list):
        raise ValueError(f"{column} is a list, not text: write the turns as messages")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column} is not text: write it as text")
    if not (value or "").strip():
        raise ValueError(f"{column} is empty: fill it or remove the record")
    return str(value)


def _tools(tools: Any) -> list[Any]:
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        tools = None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools is not a list of mappings: give the JSON schema of each tool")
    return tools


def _without_nulls(value: Any) -> Any:
    """Leave out null keys at all levels: a table has them wherever another record has a value."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value

"""A tokenizer's chat template: a conversation as text, and which characters the assistant writes.

transformers renders it, in its sandbox of jinja. A template that marks what the assistant writes with
`{% generation %}` is believed. For others, a turn of the assistant begins where the conversation before it,
rendered with the prompt to answer, ends, and ends where the conversation up to it does, its end-of-turn token
included and white space after that token not: what the model reads, and what it must write, in use. Both
must be parts of the whole conversation as rendered. A template that renders a turn otherwise when it is the
last one (of models that think first) is asked where a mark after the content ends up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stableqat.errors import first_line

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Stands behind a content; no text holds this noncharacter.
_MARK = "\ufdd0"


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations; plain data.

    Args:
        source: The template, in jinja.
        names: The tokens that it may name, such as ("bos_token", "<s>").
        special: The special tokens, of which one may end a turn.
    """

    source: str
    names: tuple[tuple[str, str], ...]
    special: tuple[str, ...]

    def rendered(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, *, spans: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and the [start, stop) characters of each turn of the assistant.

        Args:
            messages: The turns.
            tools: JSON schemas of the tools that the assistant may call.
            spans: Look for what the assistant writes.

        Raises:
            ValueError: If the template refuses the conversation, or its parts do not agree with the whole.
        """
        if not spans:
            return self._text(messages, tools), []
        if _GENERATION.search(self.source):
            return self._render(messages, tools, return_assistant_tokens_mask=True)
        whole, found = self._text(messages, tools), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._text(messages[:number], tools, add_generation_prompt=True)
                through = self._text(messages[: number + 1], tools)
                if not whole.startswith(before):
                    raise ValueError(
                        f"the chat template renders what precedes message {number + 1} in another way than "
                        "its prompt to answer, so the assistant's tokens are unknown: use a "
                        "template with {% generation %}"
                    )
                stop = len(through)
                if not whole.startswith(through):
                    stop = self._stop(messages, number, tools, whole)
                found.append((len(before), self._without_space(whole, len(before), stop)))
        return whole, found

    def _stop(
        self, messages: Sequence[dict[str, Any]], number: int, tools: list[Any] | None, whole: str
    ) -> int:
        """Where a turn ends that is rendered otherwise when it is the last one."""
        content = messages[number].get("content") or ""
        kept = content.rstrip()
        turn = {**messages[number], "content": kept + _MARK + content[len(kept) :]}
        marked = self._text([*messages[:number], turn, *messages[number + 1 :]], tools)
        place, _, after = self._text([*messages[:number], turn], tools).rpartition(_MARK)
        place, _, rest = marked.partition(_MARK)
        if place + rest != whole or not rest.startswith(after):
            raise ValueError(
                f"the chat template renders message {number + 1} in another way when others follow, so the "
                "assistant's tokens are unknown: use a template with {% generation %}"
            )
        return len(place) + len(after)

    def _without_space(self, whole: str, start: int, stop: int) -> int:
        """The end of a turn, without white space after its end-of-turn token."""
        turn = whole[start:stop].rstrip()
        return start + len(turn) if turn.endswith(self.special) else stop

    def _text(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, **options: bool) -> str:
        return self._render(messages, tools, **options)[0]

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, **options: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        given: dict[str, Any] = {"tools": tools, "chat_template": self.source, **options, **dict(self.names)}
        try:
            rendered: Any = render_jinja_template([list(messages)], **given)
        except Exception as error:  # a template raises its own errors, and Python's
            raise ValueError(
                f"the chat template refuses it ({first_line(error)}): change the messages"
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

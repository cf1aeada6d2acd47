"""SentencePiece's BPE, as in Llama 2: llama.cpp merges any pair that forms a token, the best score first.

transformers stores such a tokenizer as a list of merges in the order of the scores. Both make the same tokens
if the list has every split of each token, and all splits of one token before those of the next.
"""

from itertools import pairwise
from typing import Any

SPACE = "\u2581"  # stands for a space in tokens
UNKNOWN, BYTE = 2, 6  # ggml's types of a token


def is_sentencepiece(described: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` falls back to bytes, as SentencePiece does."""
    return bool(described["model"].get("byte_fallback"))


def scores(described: dict[str, Any], texts: dict[int, str]) -> dict[int, float] | None:
    """Return the order in which llama.cpp must merge.

    Args:
        described: A `tokenizer.json`.
        texts: Texts of all tokens, by number.

    Returns:
        Scores by number; None if llama.cpp would merge differently.
    """
    model = described["model"]
    vocabulary, numbers = model["vocab"], {text: number for number, text in texts.items()}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    made = ["".join(merge) for merge in merges]
    order = [text for text, after in pairwise([*made, ""]) if text != after]
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    added = {each["content"] for each in described["added_tokens"]}
    plain = {text for text in vocabulary if len(text) > 1} - bytes_ - added
    splits = {(t[:i], t[i:]) for t in plain for i in range(1, len(t)) if {t[:i], t[i:]} <= vocabulary.keys()}
    if not (
        space_in_front(described) is not None
        and bytes_ <= vocabulary.keys()
        and len(order) == len(set(order))
        and set(order) == plain
        and set(map(tuple, merges)) == splits
    ):
        return None
    return {numbers[text]: -float(rank) for rank, text in enumerate(order)}


def types(described: dict[str, Any]) -> dict[int, int]:
    """Return the types of the tokens that are not text, by number."""
    vocabulary, unknown = described["model"]["vocab"], described["model"].get("unk_token")
    found = {number: BYTE for text, number in vocabulary.items() if text.startswith("<0x") and len(text) == 6}
    return found | ({} if unknown is None else {vocabulary[unknown]: UNKNOWN})


def space_in_front(described: dict[str, Any]) -> bool | None:
    """Whether the tokenizer puts a space before texts; None if it treats spaces in another way."""
    if _prepends(described):
        return True
    splitter = described.get("pre_tokenizer") or {}
    kind = splitter.get("type"), splitter.get("split"), splitter.get("replacement")
    if described.get("normalizer") is not None or kind != ("Metaspace", False, SPACE):
        return None
    return splitter["prepend_scheme"] != "never"


def is_exact(described: dict[str, Any]) -> bool:
    """Whether llama.cpp adds no other spaces: it also puts one before spaces and after special tokens."""
    return _prepends(described) or not space_in_front(described)


def _prepends(described: dict[str, Any]) -> bool:
    before = (described.get("normalizer") or {}).get("normalizers")
    prepended = {"type": "Prepend", "prepend": SPACE}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return described.get("pre_tokenizer") is None and before == [prepended, replaced]

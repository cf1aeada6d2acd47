"""A tokenizer of transformers as GGUF metadata from which llama.cpp makes the same tokens.

llama.cpp has SentencePiece's BPE and byte-level BPE; for the latter it knows the splitters of some tokenizers
by name, and a file holds the name, not the pattern. Any other tokenizer needs llama.cpp's own converter,
whose file goes to `--template`.
"""

import json
from typing import Any

from stableqat.errors import UserError
from stableqat.export import gguf_sentencepiece

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # ggml's types of a token
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT, _DIGITS = _WORDS + r"\p{N}" + _SIGNS, _WORDS + r"\p{N}{1,3}" + _SIGNS
_NAMES = {  # by splitter, and whether words of the vocabulary are kept whole
    ("GPT-2", False): "gpt-2",
    ("digits, GPT-2", False): "smollm",
    (_DIGIT, False): "qwen2",
    (_DIGITS, False): "smaug-bpe",
    (_DIGITS, True): "llama-bpe",
}
_REMEDY = "export --format hf, run llama.cpp's convert_hf_to_gguf.py on it, and name its file as --template"


def fields(tokenizer: Any, size: int) -> dict[str, Any]:
    """Return metadata by key, without the prefix `tokenizer.`.

    Args:
        tokenizer: A fast tokenizer of transformers.
        size: Entries of the model's vocabulary; those without a token get a name that no text contains.

    Returns:
        Texts, numbers, booleans and lists.

    Raises:
        UserError: If llama.cpp would make other tokens of a text; says why.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, types = _vocabulary(described)
    if (largest := max(vocabulary)) >= size:
        raise UserError(
            f"gguf: the tokenizer has token {largest}, the model only {size} entries; name the model's own "
            "with --tokenizer"
        )
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"gguf: two tokens of the tokenizer have the same text; {_REMEDY}")
    before, after = _ends(tokenizer)
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id if before is None else before
    found = _model(described, vocabulary, size) | {
        "ggml.tokens": [vocabulary.get(number, f"[UNUSED{number}]") for number in range(size)],
        "ggml.token_type": [types.get(number, UNUSED) for number in range(size)],
        "ggml.bos_token_id": eos if bos is None else bos,  # without one, llama.cpp takes token 11
        "ggml.eos_token_id": eos if after is None else after,
        "ggml.padding_token_id": tokenizer.pad_token_id,
        "ggml.unknown_token_id": tokenizer.unk_token_id,
        "ggml.add_bos_token": before is not None,
        "ggml.add_eos_token": after is not None,
        "chat_template": _chat_template(tokenizer),
    }
    return {key: value for key, value in found.items() if value is not None}


def notes(tokenizer: Any) -> list[str]:
    """Return what llama.cpp leaves out, although it makes the same tokens of nearly any text."""
    described, lines = json.loads(tokenizer.backend_tokenizer.to_str()), []
    if (described.get("normalizer") or {}).get("type") == "NFC":
        lines.append(
            "llama.cpp skips the tokenizer's NFC normalizer: an accent as a character of its own, after its "
            "letter, makes other tokens"
        )
    if gguf_sentencepiece.is_sentencepiece(described) and not gguf_sentencepiece.is_exact(described):
        lines.append(
            "llama.cpp puts a space before every text and after special tokens, the tokenizer only before "
            "the first word: texts that begin with a space or hold special tokens make other tokens"
        )
    for key, what in (
        ("lstrip", "keeps the spaces before"),
        ("rstrip", "keeps the spaces after"),
        ("single_word", "finds inside words"),
    ):
        if tokens := [each["content"] for each in described["added_tokens"] if each[key]]:
            lines.append(f"llama.cpp {what} {', '.join(tokens[:3])}{' ...' if len(tokens) > 3 else ''}")
    return lines


def check_tokens(tokenizer: Any, tokens: list[str], source: str) -> None:
    """Refuse the tokens of another tokenizer.

    Args:
        tokenizer: The run's.
        tokens: A file's, by number.
        source: Its name, for the message.

    Raises:
        UserError: Naming the first that differs.
    """
    added = set(tokenizer.get_added_vocab())  # a converter may spell these differently
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token not in added and (number >= len(tokens) or tokens[number] != token):
            theirs = repr(tokens[number]) if number < len(tokens) else "missing"
            raise UserError(
                f"template: token {number} is {theirs} in {source}, {token!r} in the run's tokenizer; make "
                "the template from this model's hf export"
            )


def _model(described: dict[str, Any], texts: dict[int, str], size: int) -> dict[str, Any]:
    """Return what decides how texts merge into tokens."""
    if described["model"]["type"] != "BPE":
        raise UserError(f"gguf: the tokenizer is not a BPE; {_REMEDY}")
    if not gguf_sentencepiece.is_sentencepiece(described):
        merges = [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]
        return {"ggml.model": "gpt2", "ggml.pre": _name(described), "ggml.merges": merges}
    scores = gguf_sentencepiece.scores(described, texts)
    if scores is None:
        raise UserError(f"gguf: llama.cpp merges this tokenizer's bytes and spaces differently; {_REMEDY}")
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": [scores.get(number, 0.0) for number in range(size)],
        "ggml.add_space_prefix": gguf_sentencepiece.space_in_front(described),
    }


def _name(described: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer splits texts."""
    model = described["model"]
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise UserError(f"gguf: llama.cpp does not mark parts of words as the tokenizer does; {_REMEDY}")
    kinds = [step["type"] for step in _steps(described.get("normalizer"), "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise UserError(f"gguf: llama.cpp has no normalizer {', '.join(kinds)}; {_REMEDY}")
    splitter = _splitter(_steps(described.get("pre_tokenizer"), "pretokenizers"))
    name = None if splitter is None else _NAMES.get((splitter, bool(model.get("ignore_merges"))))
    if name is None or (described.get("decoder") or {}).get("type") != "ByteLevel":
        raise UserError(f"gguf: llama.cpp has no name for how the tokenizer splits texts; {_REMEDY}")
    return name


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _splitter(steps: list[dict[str, Any]]) -> str | None:
    """Return a tokenizer's splitting pattern, or what it does before GPT-2's; None for any other."""
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    first = steps[:-1]
    if steps[-1].get("use_regex", True):
        if not first:
            return "GPT-2"
        digits = len(first) == 1 and first[0]["type"] == "Digits" and first[0]["individual_digits"]
        return "digits, GPT-2" if digits else None
    if len(first) != 1 or first[0]["type"] != "Split":
        return None
    # (Removed, inverted) drops what lies between matches: nothing, as these patterns match everything
    how = first[0]["behavior"], first[0]["invert"]
    return first[0]["pattern"].get("Regex") if how in (("Isolated", False), ("Removed", True)) else None


def _vocabulary(described: dict[str, Any]) -> tuple[dict[int, str], dict[int, int]]:
    """Return the texts and types of tokens by number."""
    texts = {number: token for token, number in described["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    if gguf_sentencepiece.is_sentencepiece(described):
        types |= gguf_sentencepiece.types(described)
    for each in described["added_tokens"]:
        texts[each["id"]] = each["content"]
        if types.get(each["id"]) != gguf_sentencepiece.UNKNOWN:
            types[each["id"]] = CONTROL if each["special"] else USER_DEFINED
    return texts, types


def _ends(tokenizer: Any) -> tuple[int | None, int | None]:
    """Return the tokens that the tokenizer puts before and after every text."""
    encode = tokenizer.backend_tokenizer.encode
    bare, whole = encode("a", add_special_tokens=False).ids, encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    before, after = ([], []) if at is None else (whole[:at], whole[at + len(bare) :])
    if at is None or len(before) > 1 or len(after) > 1:
        raise UserError(
            f"gguf: llama.cpp adds one token before and after a text, the tokenizer more; {_REMEDY}"
        )
    return next(iter(before), None), next(iter(after), None)


def _chat_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template

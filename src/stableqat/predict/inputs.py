"""What to predict on: prompts from files or the command line, and image files. Nothing here needs torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stableqat.errors import UserError

CONTENTS = ("messages", "prompt", "text")  # keys of a line of JSON, the first that it has counts
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CLOSED_BY_THE_MODEL = "ends with the assistant's own message; remove it, or end with the user's"


def read_prompts(file: str | None, given: Sequence[str], *, answer: bool) -> list[dict[str, Any]]:
    """Read the prompts of a file, then those of the command line.

    Args:
        file: A .txt file with a prompt per line, or a .jsonl file whose lines have `prompt`, `text` or
            `messages`; None for none.
        given: Prompts as they are.
        answer: Whether the model is to answer: messages may then not end with its own.

    Returns:
        A mapping for each prompt, with one of the keys `prompt`, `text` and `messages`.

    Raises:
        UserError: If the file is missing or cannot be read, or a line is empty or of another form; names the
            line.
    """
    prompts = [] if file is None else _of_file(Path(file).expanduser(), answer)
    for text in given:
        if not text:
            raise UserError("prompt: is empty; give it a word to go on from")
        prompts.append({"prompt": text})
    return prompts


def _of_file(path: Path, answer: bool) -> list[dict[str, Any]]:
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompts: {path} must end in .txt (a prompt per line) or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other line breaks belong to a prompt
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"prompts: {path} cannot be read ({reason}); name another file") from error
    there = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not there:
        raise UserError(f"prompts: {path} holds no prompt; write one per line")
    if path.suffix == ".txt":
        return [{"prompt": line} for _, line in there]
    return [_of_line(line, f"prompts: {path}, line {number}", answer) for number, line in there]


def _of_line(line: str, where: str, answer: bool) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error}); correct it") from error
    key = next((key for key in CONTENTS if isinstance(record, dict) and key in record), None)
    if key is None:
        raise UserError(f"{where}: needs one of {', '.join(CONTENTS)}")
    content = record[key]
    if key != "messages":
        if not (isinstance(content, str) and content):
            raise UserError(f"{where}: {key} must be text, and not empty")
    elif not (isinstance(content, list) and content and all(map(_is_message, content))):
        raise UserError(f"{where}: messages must list mappings of role and content")
    elif answer and content[-1]["role"] == "assistant":
        raise UserError(f"{where}: {CLOSED_BY_THE_MODEL}")
    return {key: content}


def _is_message(each: Any) -> bool:
    return isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("role", "content"))


def find_images(sources: Sequence[str]) -> list[str]:
    """Find the images that paths stand for.

    Args:
        sources: Image files, and folders, which stand for all images in and below them.

    Returns:
        Paths of files, in the order of the sources; those of a folder by name.

    Raises:
        UserError: If a path does not exist, or a folder holds no image.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        if not path.exists():
            raise UserError(f"images: {source} does not exist; name a folder or image files")
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
        if not inside:
            raise UserError(f"images: {source} holds no image ({', '.join(IMAGES)})")
        found += map(str, inside)
    return found

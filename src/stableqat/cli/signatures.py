"""What classes take, read from their source code: without their imports, which take seconds."""

import ast
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

OURS = Path(__file__).parents[1]


class Argument(NamedTuple):
    """An argument of a class.

    Attributes:
        default: As it stands in the source; None if the argument is required.
        text: Its description in the docstring.
    """

    default: str | None
    text: str


@cache
def our_classes(room: str) -> dict[str, ast.ClassDef]:
    """Return the classes of a folder of this package by name."""
    return classes((OURS / room).glob("*.py"))


@cache
def trainer_class() -> dict[str, ast.ClassDef]:
    """Return Lightning's Trainer, by name."""
    lightning = find_spec("lightning")
    assert lightning is not None
    assert lightning.origin is not None
    return classes([Path(lightning.origin).parent / "pytorch" / "trainer" / "trainer.py"])


def classes(files: Iterable[Path]) -> dict[str, ast.ClassDef]:
    """Return the classes that files define, by name; none if one of the files cannot be read."""
    with suppress(OSError, SyntaxError):
        trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
        return {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    return {}


def signature(
    known: dict[str, ast.ClassDef], name: str, method: str = "__init__"
) -> dict[str, Argument] | None:
    """Return what a method takes, with what it hands on to the base class.

    Args:
        known: Classes by name.
        name: The class.
        method: Its method.

    Returns:
        Arguments by name; None if a base class that takes some is not among the classes.
    """
    found: dict[str, Argument] = {}
    decided = {"self"}  # what a class does not leave to its caller
    while name in known:
        texts = _texts(known[name], method)
        for each in known[name].body:
            if isinstance(each, ast.FunctionDef) and each.name == method:
                own = {
                    key: Argument(value, texts.get(key, "")) for key, value in _defaults(each.args).items()
                }
                found = {key: value for key, value in own.items() if key not in decided} | found
                if each.args.kwarg is None:
                    return found
                calls = [c for c in ast.walk(each) if isinstance(c, ast.Call)]
                above = (c for c in calls if ast.unparse(c.func) == f"super().{method}")
                decided |= {k.arg for call in above for k in call.keywords if k.arg} - found.keys()
        name = ".".join(map(ast.unparse, known[name].bases[:1]))
    return None


def _defaults(taken: ast.arguments) -> dict[str, str | None]:
    positional = [*taken.posonlyargs, *taken.args]
    required = len(positional) - len(taken.defaults)
    values: list[ast.expr | None] = [None] * required + list(taken.defaults) + list(taken.kw_defaults)
    names = [each.arg for each in (*positional, *taken.kwonlyargs)]
    return {n: None if v is None else ast.unparse(v) for n, v in zip(names, values, strict=True)}


def _texts(cls: ast.ClassDef, method: str) -> dict[str, str]:
    from docstring_parser import parse

    functions = [each for each in cls.body if isinstance(each, ast.FunctionDef) and each.name == method]
    docstrings = [ast.get_docstring(cls), *map(ast.get_docstring, functions)]
    params = [param for text in docstrings if text for param in parse(text).params]
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}

"""Completion of verbs and settings in a shell, as a script that needs no Python while one types."""

import argparse
from typing import Any, Literal, get_args, get_origin

from stableqat.cli.help import RUN_VERBS, run_settings
from stableqat.cli.tool import TOOL_VERBS, tool_parser


def completion(shell: Literal["bash", "zsh", "tcsh", "fish"]) -> int:
    """Print the completion script of a shell.

    Args:
        shell: bash, zsh, tcsh or fish. bash reads such scripts from
            ~/.local/share/bash-completion/completions.

    Returns:
        0.
    """
    import shtab

    print(shtab.complete(_commands(), shell))
    return 0


def _commands() -> argparse.ArgumentParser:
    """Verbs and flags as a parser of argparse, which shtab reads."""
    parser = argparse.ArgumentParser(prog="stableqat")
    verbs = parser.add_subparsers()
    for verb, text in RUN_VERBS.items():
        flags = verbs.add_parser(verb, help=text, description=text)
        for key, described in run_settings(verb).items():
            names = ("-c", "--config") if key == "config" else (f"--{key}",)
            _add(flags, names, described)
    groups: dict[str, Any] = {"": verbs}
    for verb, (_, text) in TOOL_VERBS.items():
        group, _, name = verb.rpartition(" ")
        if group not in groups:
            groups[group] = verbs.add_parser(group, help=group).add_subparsers()
        flags = groups[group].add_parser(name, help=text, description=text)
        for action in tool_parser(verb)._actions:
            if action.option_strings and "--help" not in action.option_strings:
                _add(flags, action.option_strings, action.help, _choices(action))
    return parser


def _choices(action: Any) -> list[str] | None:
    kind = getattr(action, "_typehint", None)
    return [str(each) for each in get_args(kind)] if get_origin(kind) is Literal else None


def _add(parser: argparse.ArgumentParser, names: Any, text: str | None, choices: Any = None) -> None:
    import shtab

    short = (text or "").split(". ")[0].replace("%", "%%")
    added: Any = parser.add_argument(*names, help=short, choices=choices)
    if choices is None:
        added.complete = shtab.FILE

"""The layers of a run's settings in the order of the command line: what each `-c` and each flag sets."""

import filecmp
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal

import yaml

from stableqat import trust
from stableqat.errors import UserError
from stableqat.shipped import find_config, shipped_config
from stableqat.trust import flags, walk

QUANTIZERS = tuple(f"model.{key}" for key in trust.QUANTIZERS)
_SPEC = {"class_path", "init_args", "dict_kwargs"}
_UNREADABLE = (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError)  # the parser says so

Kind = Literal["class", "mapping", "null"]


@dataclass(frozen=True)
class Layer:
    """What one `-c` or one flag sets.

    Attributes:
        at: Its place among the arguments.
        where: The start of a message about it: its file, if it is one.
        settings: Values by dotted key, without `init_args`.
        inline: Whether it is YAML in place of a file.
    """

    at: int
    where: str = ""
    settings: list[tuple[str, Any]] = field(default_factory=list)
    inline: bool = False


def read_layers(arguments: Sequence[str]) -> tuple[list[str], list[Layer]]:
    """Read what a command line sets.

    Args:
        arguments: The verb and its flags.

    Returns:
        The arguments with files in place of the names of shipped configurations, and the layers.

    Raises:
        UserError: If a configuration does not exist, or it or a flag holds a key twice.
    """
    named, layers = list(arguments), []
    for at, (flag, value) in enumerate(pairwise(["", *arguments])):
        start = "--config=" if value.startswith("--config=") else ""
        name = value.removeprefix(start)
        if not (start or flag in ("-c", "--config")) or name.startswith("-"):
            if value.startswith("--"):
                key, equals, joined = value.partition("=")
                given = joined if equals else "".join(arguments[at + 1 : at + 2])
                _check_once(_node(given), above=key.removeprefix("--"))
                layers.append(Layer(at, "", list(_shortened(flags(arguments[at : at + 2])))))
            continue
        first = at if start else at - 1
        if re.search(r"[:{\n]", name):
            layers.append(Layer(first, "", _read(name), inline=True))
            continue
        path = find_config(name)
        if (other := shipped_config(name)) and not filecmp.cmp(path, other, shallow=False):
            print(f"stableqat: {path}: the file here, not the shipped configuration", file=sys.stderr)
        named[at] = f"{start}{path}"
        text = ""
        with suppress(*_UNREADABLE):
            text = path.read_text()
        layers.append(Layer(first, f"{path}: ", _read(text, f"{path}: ")))
    return named, layers


def settle_quantizer(
    arguments: Sequence[str], layers: Sequence[Layer], options: Collection[str]
) -> list[str]:
    """Let a class or a mapping replace a mapping of quantizers, as the parser would mix the two.

    Args:
        arguments: The verb and its flags.
        layers: What they set.
        options: Settings of quantizers.

    Returns:
        The arguments, with the quantizer set to null before each layer that replaces it whole.

    Raises:
        UserError: If a setting of one quantizer is laid over a mapping, or a mapping cannot be meant.
    """
    settled = list(arguments)
    replaced = [
        (layer.at, f"--{quantizer}=null")
        for quantizer in QUANTIZERS
        for layer in _replacing(quantizer, layers, options)
    ]
    for at, flag in sorted(replaced, reverse=True):
        settled.insert(at, flag)
    return settled


def _replacing(quantizer: str, layers: Sequence[Layer], options: Collection[str]) -> Iterator[Layer]:
    """The layers that replace a quantizer whole, where one of the two is a mapping."""
    kind = None
    for layer in layers:
        given = _kind(layer, quantizer, options)
        if given and kind and "null" not in (given, kind) and "mapping" in (given, kind):
            yield layer
        elif given is None and kind == "mapping":
            for key, _ in layer.settings:
                option = key.removeprefix(f"{quantizer}.")
                if option != key and option in options:
                    raise UserError(
                        f"{layer.where}{key}: a mapping takes no {option} of its own; set it in the entries "
                        f"of the mapping, or name one class first, as --{quantizer} STE"
                    )
        if given == "mapping":
            _check_order(layer, quantizer)
        kind = given or kind


def _check_order(layer: Layer, quantizer: str) -> None:
    """Refuse `*` before `*.mlp`: the first match wins, and the parser would take the latter for a setting."""
    patterns = [str(pattern) for key, value in layer.settings if key == quantizer for pattern in value]
    for first, later in combinations(patterns, 2):
        if later.startswith(f"{first}."):
            raise UserError(
                f"{layer.where}{quantizer}: {first} comes before {later}, and the first match wins; put "
                f"{later} first, or leave one of them out"
            )


def _kind(layer: Layer, quantizer: str, options: Collection[str]) -> Kind | None:
    """What a layer makes of the quantizer; None if it says nothing, or only settings of one."""
    kind: Kind | None = None
    for key, value in layer.settings:
        if key == f"{quantizer}.class_path" and isinstance(value, str):
            kind = "class"
        elif key != quantizer:
            continue
        elif value in (None, "null"):
            kind = "null"
        elif isinstance(value, str) or (isinstance(value, dict) and "class_path" in value):
            kind = "class"
        elif isinstance(value, dict) and not (value and value.keys() <= {*_SPEC, *options}):
            kind = "mapping"
    return kind


def _read(text: str, where: str = "") -> list[tuple[str, Any]]:
    root, settings = _node(text), []
    with suppress(*_UNREADABLE):
        if root is not None:
            settings = list(_shortened(walk(yaml.SafeLoader("").construct_document(root), where)))
    _check_once(root, where)
    return settings


def _node(text: str) -> yaml.Node | None:
    with suppress(*_UNREADABLE):
        return yaml.SafeLoader(text).get_single_node()
    return None


def _check_once(root: yaml.Node | None, where: str = "", above: str = "") -> None:
    """Refuse a key that stands twice in a mapping, also in one below a key: YAML silently takes the last."""
    stack, seen = [(above, root)], set()
    while stack:
        above, node = stack.pop()
        if id(node) in seen:  # an alias may lead back
            continue
        seen.add(id(node))
        lines: dict[str, int] = {}
        if isinstance(node, yaml.SequenceNode):
            stack += [(above, each) for each in node.value]
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name, line = f"{above}.{key.value}", key.start_mark.line + 1
            if name in lines:
                at = f", in lines {lines[name]} and {line}" if lines[name] < line else ""
                raise UserError(
                    f"{where}{name.strip('.').replace('.init_args', '')}: stands twice{at}, and YAML takes "
                    "only the last; leave one of them out"
                )
            lines[name] = line
            stack.append((name, value))


def _shortened(settings: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for key, value in settings:
        parts = key.strip(".+").split(".")
        if parts[-1] != "init_args":  # its arguments follow, each by itself
            yield ".".join(part for part in parts if part != "init_args"), value

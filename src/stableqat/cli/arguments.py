"""The arguments of a run's verb, checked before the libraries are imported, which takes seconds.

Configuration files must exist, paths too, and a key must be an argument of what it belongs to: of Lightning's
Trainer, of a callback, of the class of the model, its data or its quantizer. Their arguments are read from
their source code. Where that does not name all of them, for a user's own class for example, the parser
decides.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from stableqat.cli.layers import QUANTIZERS, Layer, read_layers, settle_quantizer
from stableqat.cli.signatures import our_classes, signature, trainer_class
from stableqat.errors import LISTED, UserError, nearest
from stableqat.files import as_it_stands, is_missing

# configurable callbacks, each under a key of its own
CALLBACKS = {
    "baseline": "Baseline",
    "guard": "DivergenceGuard",
    "monitor": "QuantizerMonitor",
    "mismatch": "GradientMismatch",
    "throughput": "Throughput",
    "trajectory": "Trajectory",
    "evaluate": "Evaluate",
    "ema": "EMA",  # after those that measure the average it puts in place
    "best": "BestCheckpoint",
    "last": "LastCheckpoint",
}

_ROOMS = {"model": "modules", "data": "data"} | dict.fromkeys(QUANTIZERS, "quantizers")
_OF_THE_PARSER = ("config", "help", "print_config", "seed_everything", "trainer", "model", "data")
_START = "a run, a checkpoint, a model folder or a name on the Hub"
_PATHS = {
    "ckpt_path": "a checkpoint, or leave it out to start anew",
    "model.init_from": _START,
    "model.teacher.source": _START,
    "data.source": "a file, a folder or a data set on the Hub",
    "data.tokenizer": "a tokenizer's file or folder, or a name on the Hub",
}

Setting = tuple[str, str, Any]  # where it is from, its key without init_args, its value


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """Refuse what is certainly wrong on the command line of fit, validate or test.

    Args:
        arguments: The verb and its flags.

    Returns:
        The arguments with files in place of the names of shipped configurations, and made so that a later
        quantizer replaces a mapping of them.

    Raises:
        UserError: If a configuration or a path does not exist, an overlay comes before its base, or a key is
            unknown.
    """
    named, layers = read_layers(arguments)
    _check_bases(layers)
    _check_paths(named)
    settings: list[Setting] = [
        (each.where, *one) for each in layers if not each.inline for one in each.settings
    ]
    # left to the parser, but the classes that they name count
    left: list[Setting] = [(each.where, *one) for each in layers if each.inline for one in each.settings]
    _check_keys(arguments[0], settings, left)
    known = our_classes("quantizers")
    options = set().union(*(_names(known, name) or () for name in known))
    return settle_quantizer(named, layers, options)


def _check_bases(layers: Sequence[Layer]) -> None:
    """Refuse a file that changes a model, data or a quantizer whose class comes later or not at all."""
    method = QUANTIZERS[0]
    for block, first in {"model": "the base", "data": "the base", method: "a method"}.items():
        for layer in layers:
            named = list(_named_classes([("", *one) for one in layer.settings], block))
            if any(named) or (named and block == method):  # a mapping names classes below
                break
            if layer.where and any(key.startswith(f"{block}.") for key, _ in layer.settings):
                what = block.rpartition(".")[2]
                raise UserError(
                    f"{layer.where}changes the {what}, but nothing before it says which {what}; put {first} "
                    "first, as in -c llama/base -c llama/ste"
                )


def _check_paths(arguments: Sequence[str]) -> None:
    given: dict[str, str] = {}
    for flag, following in pairwise([*arguments, ""]):
        flag, equals, joined = flag.partition("=")
        if flag in ("-c", "--config"):
            given.clear()  # the file may name another
        given[flag.removeprefix("--").replace("init_args.", "")] = joined if equals else following
    if given.get("ckpt_path", "null") != "null":
        given.pop("model.init_from", None)  # a resumed run outlives its start
    for key in _PATHS.keys() & given.keys():
        path = given[key]
        local = key == "ckpt_path" and not re.match(r"(last|best|null)$|-", path)
        if is_missing(path) or (local and not Path(path).expanduser().exists()):
            raise UserError(f"{key}: {path} does not exist{as_it_stands(path)}; name {_PATHS[key]}")


def _check_keys(verb: str, settings: Sequence[Setting], left: Sequence[Setting]) -> None:
    trainer = trainer_class()
    options = _names(trainer, "Trainer", verb)
    known = {
        "": options and {*options, *_OF_THE_PARSER, *CALLBACKS},
        "trainer": _names(trainer, "Trainer"),
    }
    callbacks = our_classes("callbacks")
    known |= {key: _names(callbacks, name) for key, name in CALLBACKS.items()}
    for block, room in _ROOMS.items():
        made = our_classes(room)
        every = [_arguments_of(made, name) for name in _named_classes([*settings, *left], block)]
        known[block] = set().union(*filter(None, every)) if every and None not in every else None
    for quantizer in QUANTIZERS:
        known[quantizer] = (known[quantizer] or set()) - {"weight", "features"}  # the layer's
    for where, key, value in settings:
        parts = key.split(".")
        if isinstance(value, dict) or {"class_path", "dict_kwargs", "help"} & set(parts):
            continue
        for depth, part in enumerate(parts):
            names = known.get(".".join(parts[:depth]))
            if part and names and part not in names:
                block = ".".join(parts[:depth])
                if other := _other_class(block, part):
                    named = list(_named_classes([*settings, *left], block))[-1].rpartition(".")[2]
                    raise UserError(
                        f"{where}{block}.{part}: a setting of {other}, but the {block} is {named}; leave "
                        f"{'it or the whole file' if where else 'it'} out"
                    )
                keys = [f"{b}.{n}".strip(".") for b, inside in known.items() for n in inside or ()]
                if near := nearest_key(key, keys):
                    remedy = f"did you mean {near}?"
                elif len(names) > LISTED:
                    remedy = f"stableqat {verb} --help lists the settings"
                else:
                    remedy = f"choose one of {', '.join(sorted(names))}"
                raise UserError(f"{where}{key}: unknown key; {remedy}")


def _other_class(block: str, option: str) -> str | None:
    """The class of this package for a block that takes an option which the given one does not."""
    made = our_classes(_ROOMS[block]) if block in ("model", "data") else {}
    whole = [name for name in made if name.endswith("Module")]
    return next((name for name in whole if option in (_names(made, name) or ())), None)


def nearest_key(key: str, options: Sequence[str]) -> str | None:
    """The known dotted key that an unknown one may stand for: misspelt in one part, or without its block.

    Args:
        key: What the user wrote.
        options: The keys that exist.
    """
    parts, known = key.split("."), [option.split(".") for option in options]
    for depth, part in enumerate(parts):
        names = {o[depth] for o in known if o[:depth] == parts[:depth] and len(o) > depth}
        if part not in names:
            if near := nearest(part, names):
                return ".".join([*parts[:depth], near, *parts[depth + 1 :]])
            break
    return next((option for option in options if option.endswith(f".{key}")), None)


def _named_classes(settings: Iterable[Setting], block: str) -> Iterator[str]:
    """The classes that settings name for a block; an empty name if one does without."""
    for _, key, value in settings:
        if key in (block, f"{block}.class_path") and value not in (None, "null"):
            whole = isinstance(value, dict) and value.keys() <= {"class_path", "init_args", "dict_kwargs"}
            if not whole:
                yield value if isinstance(value, str) else ""


def _arguments_of(known: dict[str, ast.ClassDef], name: str) -> set[str] | None:
    home, _, short = name.rpartition(".")
    return _names(known, short) if home.partition(".")[0] in ("", "stableqat") else None


def _names(known: dict[str, ast.ClassDef], name: str, method: str = "__init__") -> set[str] | None:
    taken = signature(known, name, method)
    return None if taken is None else set(taken)

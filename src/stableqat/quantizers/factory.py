"""Methods by name, and factories whose options are checked and bound."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from stableqat import quantizers
from stableqat.errors import UserError, did_you_mean
from stableqat.quantizers import Quantizer, QuantizerFactory, QuantizerSpec

NamedSpec = str | QuantizerFactory | Mapping[str, str | QuantizerFactory | None]
"""A `QuantizerSpec` in which a method may be given by its name."""


def methods() -> dict[str, type[Quantizer]]:
    """The methods of this package by class name, controls included."""
    made = {name: getattr(quantizers, name) for name in quantizers.__all__}
    found = {n: c for n, c in made.items() if isinstance(c, type) and issubclass(c, Quantizer)}
    return {name: cls for name, cls in found.items() if cls is not Quantizer}


def make_factory(quantizer: NamedSpec, options: dict[str, Any]) -> QuantizerSpec:
    """The factory or factories that make the quantizers of a model.

    Args:
        quantizer: A method by name or a factory, or a mapping of these by layer pattern.
        options: Options of the methods; in a mapping, of those given by name.

    Raises:
        UserError: If a method or an option is unknown.
    """
    if not isinstance(quantizer, Mapping):
        return _bound(quantizer, options)
    check_mapping(quantizer)
    if options and not any(isinstance(each, str) for each in quantizer.values()):
        option = next(iter(options))
        raise UserError(f"{option}: the mapping names no method; bind the option with functools.partial")
    made: dict[str, QuantizerFactory | None] = {}
    for pattern, each in quantizer.items():
        try:
            made[pattern] = None if each is None else _bound(each, options if isinstance(each, str) else {})
        except UserError as error:
            problem = str(error).removeprefix("quantizer: ")
            raise UserError(f"quantizer: pattern {pattern}: {problem}") from error
    return made


def check_mapping(quantizer: Mapping[Any, Any], key: str = "quantizer") -> None:
    """Refuse a mapping that quantizes nothing, or whose patterns are not text.

    Args:
        quantizer: Factories or names of methods by layer pattern.
        key: The setting, for messages.

    Raises:
        UserError: Naming the pattern.
    """
    if not quantizer:
        raise UserError(f"{key}: the mapping is empty; give it a pattern, such as '*', with a quantizer")
    for pattern in quantizer:
        if not isinstance(pattern, str):
            raise UserError(f"{key}: pattern {pattern!r} is not text; put it in quotes")
    if all(each is None for each in quantizer.values()):
        raise UserError(
            f"{key}: every pattern of the mapping leaves its layers as they are; give one a quantizer"
        )


def _bound(quantizer: str | QuantizerFactory, options: dict[str, Any]) -> QuantizerFactory:
    factory = _named(quantizer)
    _check_options(factory, options)
    return partial(factory, **options) if options else factory


def _named(quantizer: str | QuantizerFactory) -> QuantizerFactory:
    if isinstance(quantizer, Quantizer):
        given = type(quantizer).__name__
        raise UserError(f"quantizer: each weight gets its own; give the class {given}, not an instance")
    if callable(quantizer):
        return quantizer
    if not isinstance(quantizer, str):
        raise UserError(f"quantizer: {quantizer!r} makes no quantizers; give a method's name, or its class")
    known = {name.lower(): cls for name, cls in methods().items()}
    if quantizer.lower() not in known:
        raise UserError(f"quantizer: {quantizer} is unknown; {did_you_mean(quantizer, known)}")
    return known[quantizer.lower()]


def _check_options(factory: QuantizerFactory, options: dict[str, Any]) -> None:
    """Refuse what a method does not take; a function checks its own options."""
    method = factory.func if isinstance(factory, partial) else factory
    if not (isinstance(method, type) and issubclass(method, Quantizer)):
        return
    known: list[str] = []
    for each in method.__mro__:
        parameters = inspect.signature(each).parameters.values()
        known += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if each is Quantizer or not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    known = sorted(set(known) - {"weight", "surrogate"})  # a method brings the latter
    for option in options:
        if option not in known:
            raise UserError(f"{option}: {method.__name__} has no such option; {did_you_mean(option, known)}")

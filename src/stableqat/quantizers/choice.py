"""Which layers are quantized, and how: patterns over their names, the first match wins."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Generic, TypeVar, cast

from stableqat.errors import UserError
from stableqat.quantizers.factory import check_mapping

Factory = TypeVar("Factory")


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of `skip` selects a layer: it matches the full name or a part between dots."""
    return any(fnmatchcase(part, pattern) for part in (name, *name.split(".")))


class Choice(Generic[Factory]):
    """Which layers are left alone, and which factory serves each of the others.

    Args:
        quantizer: One factory, or factories by layer pattern.
        skip: Patterns of layers to leave alone.
        key: The setting, for messages.
    """

    def __init__(
        self, quantizer: Factory | Mapping[str, Factory | None], skip: Sequence[str], key: str = "quantizer"
    ) -> None:
        self.key, self.mapped = key, isinstance(quantizer, Mapping)
        self.factories: Mapping[str, Factory | None] = {"*": cast(Factory, quantizer)}
        if isinstance(quantizer, Mapping):
            check_mapping(quantizer, key)
            self.factories = quantizer
        self.skip = skip
        self.chosen: dict[str, str] = {}  # pattern by layer

    def left(self, name: str, *, quantized: bool) -> str | None:
        """Why a layer is left alone: skipped, or already quantized, which counts for its pattern; or None."""
        if skipping := next((pattern for pattern in self.skip if matches(name, pattern)), None):
            return f"skip: {skipping}"
        if quantized:
            self.pattern(name)
            return "quantized already"
        return None

    def pattern(self, name: str) -> str:
        """The first pattern that matches a layer."""
        if name not in self.chosen:
            found = next((p for p in self.factories if matches(name, p)), None)
            if found is None:
                raise UserError(
                    f"{self.key}: no pattern matches layer {name}; add one, or end with '*' (null leaves a "
                    "layer in full precision)"
                )
            self.chosen[name] = found
        return self.chosen[name]

    def named(self, name: str) -> str:
        """A layer for a message, with its pattern if there is a mapping."""
        return f"{name} (pattern {self.pattern(name)})" if self.mapped else name

    def of(self, name: str) -> Factory | None:
        """The factory of a layer; None for full precision."""
        return self.factories[self.pattern(name)]

    def check(self) -> None:
        """Refuse a pattern that chooses nothing."""
        if len(self.factories) > 1 and (idle := [p for p in self.factories if p not in self.chosen.values()]):
            raise UserError(
                f"{self.key}: {idle[0]} chooses no layer; correct it, leave it out, or put it before the "
                "patterns that match the same layers, which may not be in skip"
            )

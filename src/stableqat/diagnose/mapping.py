"""A `quantizer:` mapping of mixed widths, as an overlay that `stableqat fit` takes.

Layers of the same kind, such as all `mlp.down_proj`, share a pattern with their most frequent width; layers
that differ are named before it, and `*` stands for the most frequent width of all.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stableqat.surgery import matches


def patterns_of(widths: Mapping[str, int]) -> dict[str, int]:
    """The widths of layers as few patterns, of which the first that matches counts.

    Args:
        widths: By layer.
    """
    kinds: dict[str, Counter[int]] = {}
    for name, bits in widths.items():
        kinds.setdefault(_kind(name), Counter())[bits] += 1
    usual = {kind: counted.most_common(1)[0][0] for kind, counted in kinds.items()}
    (everywhere, _), *_ = Counter(usual[_kind(name)] for name in widths).most_common()
    found = {name: bits for name, bits in widths.items() if bits != usual[_kind(name)]}
    found |= {kind: bits for kind, bits in usual.items() if bits != everywhere}
    found["*"] = everywhere
    first = {name: next(bits for each, bits in found.items() if matches(name, each)) for name in widths}
    return found if first == dict(widths) else dict(widths)


def overlay(
    patterns: Mapping[str, int],
    quantizer: str,
    options: Mapping[str, Any],
    skip: Sequence[str] | None,
    comments: Sequence[str],
) -> str:
    """A configuration file that sets the quantizers of a model.

    Args:
        patterns: Width by layer pattern.
        quantizer: Name of the quantizer's class.
        options: Its other arguments.
        skip: Layers to leave alone; None for the default.
        comments: Lines at the top.
    """
    lines = [*(f"# {line}" for line in comments), "model:", "  init_args:"]
    if skip is not None:
        lines.append(f"    skip: {json.dumps(list(skip))}")
    lines.append("    quantizer:")
    for pattern, bits in patterns.items():
        arguments = ", ".join(f"{key}: {value}" for key, value in {"bits": bits, **options}.items())
        made = f"{{class_path: stableqat.quantizers.{quantizer}, init_args: {{{arguments}}}}}"
        lines.append(f"      {json.dumps(pattern)}: {made}")
    return "\n".join(lines) + "\n"


def _kind(name: str) -> str:
    """A layer's name with a star in place of its block's number."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)

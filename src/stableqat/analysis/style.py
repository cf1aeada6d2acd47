"""How a method looks: one colour and one marker in every picture of a comparison, a benchmark or a notebook.

The colours of the suite's methods are those of Okabe and Ito, and of Tol for the controls of where the
gradient is taken: colour-blind readers can tell them apart. The look of any other method follows from its
name, so it too is the same in every picture. Several arms of one method share its look and differ by line
style and, if there are more arms than line styles, by the fill of the marker.
"""

import textwrap
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stableqat.analysis.arms import Arm

Style = dict[str, Any]

LOOKS = {
    "FP": ("black", "."),
    "STE": ("#009E73", "o"),
    "DSQ": ("#0072B2", "s"),
    "ParetoQ": ("#D55E00", "D"),
    "LRQAT": ("#332288", "p"),
    "StableQAT": ("#CC79A7", "^"),
    "ScaledSTE": ("#E69F00", "v"),
    "PermutedStableQAT": ("#56B4E9", "P"),
    "STEAtWeight": ("#AA4499", "d"),
    "STEAtRandomRounding": ("#44AA99", "8"),
    "STEAtNoise": ("#DDCC77", "H"),
}
OTHER_COLOURS = ("#882255", "#999933", "#661100")
OTHER_MARKERS = ("<", ">", "h", "*", "X")
LINES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (6, 2, 1, 2)),
    (0, (2, 1)),
    (0, (10, 2, 3, 2)),
    (0, (9, 1, 1, 1, 1, 1)),
)
LINE = 48  # characters of a name on one line of a picture
FILLS = ("full", "none", "left", "bottom")


def look_of(method: str) -> tuple[str, str]:
    """Colour and marker of a method, or of another library in a benchmark."""
    number = zlib.crc32(method.encode())
    other = OTHER_COLOURS[number % len(OTHER_COLOURS)], OTHER_MARKERS[number // 7 % len(OTHER_MARKERS)]
    return LOOKS.get(method, other)


def colour_of(method: str) -> str:
    """Colour of a method."""
    return look_of(method)[0]


def styles_of(arms: Iterable["Arm"]) -> dict[str, Style]:
    """The line style of each arm, by label, as arguments of matplotlib."""
    styles: dict[str, Style] = {}
    variants: Counter[str] = Counter()
    for arm in arms:
        if arm.label not in styles:
            fill, line = divmod(variants[arm.method], len(LINES))
            styles[arm.label] = dict(zip(("color", "marker"), look_of(arm.method), strict=True))
            styles[arm.label] |= {"linestyle": LINES[line], "fillstyle": FILLS[fill % len(FILLS)]}
            variants[arm.method] += 1
    return styles


def as_written(name: str, line: int = LINE) -> str:
    """A name for matplotlib, which breaks no lines, and reads text between dollars as a formula."""
    return "\n".join(textwrap.wrap(name, line)).replace("$", r"\$")


def line_of(names: Iterable[str]) -> int:
    """Characters of the longest line of some names, as written."""
    return max(len(line) for name in names for line in as_written(name).split("\n"))

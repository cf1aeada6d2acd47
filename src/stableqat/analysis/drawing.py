"""What all pictures share: a colour of its own for each method, and names as they are written.

Colours are Okabe and Ito's, told apart by colour-blind readers; a method that is none of the suite's has
one of some others, always the same by its name.
"""

import zlib

FULL_PRECISION = "black"
COLOURS = {"DSQ": "#0072B2", "ParetoQ": "#D55E00", "STE": "#009E73", "StableQAT": "#CC79A7"}
OTHERS = ("#E69F00", "#56B4E9", "#332288", "#882255", "#999933", "#661100")


def colour_of(method: str) -> str:
    """The colour of a method, or of a rival in a benchmark, in every picture."""
    if method == "FP":
        return FULL_PRECISION
    return COLOURS.get(method) or OTHERS[zlib.crc32(method.encode()) % len(OTHERS)]


def as_written(name: str) -> str:
    """A name for matplotlib, which takes what stands between dollars for a formula."""
    return name.replace("$", r"\$")

"""What `stableqat landscape` measures of a run, part by part, as plain numbers.

`ends`: the losses at the four anchors. `lines`: the loss between them, with the quadratic prediction from the
start. `inward`: whether descent at the weights and at the deployed weights leads towards the other end.
`basin`: per layer, the radius along random and top Hessian directions, in steps of the grid. `map`: the plane
through the start, its rounding and the deployed model, with the way of the deployed weights drawn in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Any

import torch

from stableqat.landscape.anchors import Anchors
from stableqat.landscape.basin import inward, of_one_step, radius
from stableqat.landscape.codes import kept_codes, read_codes
from stableqat.landscape.curvature import mean_loss, quadratic, top_eigenvectors
from stableqat.landscape.slices import Plane, line, surface
from stableqat.landscape.space import Direction, WeightSpace, dot, norm
from stableqat.runs import Run

LINES = {
    "start to its rounding": ("start", "start_deployed"),
    "start to trained": ("start", "trained"),
    "rounding to deployed": ("start_deployed", "trained_deployed"),
}
MARGIN = 0.35  # of a map's width and height, beyond its points


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        batches: Validation batches.
        batch_size: Rows per batch; None takes the run's.
        block_size: Tokens per row; None takes the run's.
        points: Points of a line.
        grid: Points along each side of a map.
        layers: How many layers to measure the basin of, evenly spread over the model.
        directions: Random directions per layer.
        rise: Of the loss, at which the basin ends.
        lanczos: Hessian products per layer.
        dtype: Type of products on lines and maps, fp32 or bf16.
    """

    batches: int
    batch_size: int | None
    block_size: int | None
    points: int
    grid: int
    layers: int
    directions: int
    rise: float
    lanczos: int
    dtype: str

    @property
    def bf16(self) -> bool:
        """Whether lines and maps are computed in autocast."""
        return self.dtype == "bf16"


def ends(anchors: Anchors, run: Run, settings: Settings) -> dict[str, Any]:
    """Losses at the anchors, and how far they lie from each other in the quantized weights."""
    found = {}
    with anchors.losses() as losses, anchors.space.kept():
        for name, point in anchors.points.items():
            anchors.space.set(point)
            found[name] = mean_loss(losses)
    length = norm(anchors.own("start"))
    pairs = {"rounding": ("start", "start_deployed"), "moved": ("start", "trained")}
    pairs["deployed_rounding"] = ("trained", "trained_deployed")
    away = {name: _between(anchors, *ends) / length for name, ends in pairs.items()}
    return {
        "loss": dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)),
        "distance": dict(zip(away, torch.stack(list(away.values())).tolist(), strict=True)),
        "codes_changed": anchors.codes_changed,
    }


def lines(anchors: Anchors, run: Run, settings: Settings) -> dict[str, Any]:
    """Losses between anchors, with what slope and curvature at the start predict."""
    shares = [number / (settings.points - 1) for number in range(settings.points)]
    found: dict[str, Any] = {"shares": shares}
    for name, (first, last) in LINES.items():
        start, end = anchors.points[first], anchors.points[last]
        with anchors.losses(bf16=settings.bf16) as losses:
            actual = line(anchors.space, losses, start, end, shares).tolist()
        found[name] = {"loss": actual}
        if first == "start":
            with anchors.losses() as losses, anchors.space.kept():
                anchors.space.set(start)
                model = quadratic(anchors.space, losses, torch._foreach_sub(end, start))
            predicted = [model.at(share) for share in shares]
            rise = predicted[-1] - predicted[0]
            found[name] |= {
                "predicted": predicted,
                "ratio": (actual[-1] - actual[0]) / rise if rise else None,
            }
    return found


def inward_test(anchors: Anchors, run: Run, settings: Settings) -> dict[str, Any]:
    """Cosines of descent with the way to the other end, in the quantized weights."""
    found = {}
    with anchors.losses() as losses, anchors.space.kept():
        for name, other in (("start", "trained"), ("trained", "start")):
            anchors.space.set(anchors.points[name])
            for place, at in (("weights", None), ("deployed", anchors.own(f"{name}_deployed"))):
                found[f"{name}_at_{place}"] = inward(anchors.quantized, losses, anchors.own(other), at)
    return found


def basin(anchors: Anchors, run: Run, settings: Settings) -> dict[str, Any]:
    """Per layer, the radius around the start, and how far rounding reaches along the steepest direction."""
    names = list(anchors.quantized.weights)
    count = min(settings.layers, len(names))
    chosen = [names[number * (len(names) - 1) // max(count - 1, 1)] for number in range(count)]
    spaces = {name: WeightSpace(anchors.module, [name]) for name in chosen}
    rounding = dict(
        zip(names, torch._foreach_sub(anchors.own("start_deployed"), anchors.own("start")), strict=True)
    )
    return {name: _layer(anchors, space, [rounding[name]], settings) for name, space in spaces.items()}


def _layer(
    anchors: Anchors, space: WeightSpace, rounding: list[torch.Tensor], settings: Settings
) -> dict[str, Any]:
    with anchors.losses() as losses, anchors.space.kept():
        anchors.space.set(anchors.points["start"])
        noises = [list(space.in_steps(space.noise(seed))) for seed in range(settings.directions)]
        random = [radius(space, losses, each, rise=settings.rise) for each in noises]
        (top,) = top_eigenvectors(space, losses, 1, steps=settings.lanczos)
        steep = radius(space, losses, top.vector, rise=settings.rise)
        unit = of_one_step(space, top.vector)
    reach = abs(dot(rounding, unit) / dot(unit, unit)).item()
    return {
        "rounding": _steps(space, rounding),
        "random": median(random),
        "top": steep,
        "top_reach": reach,
        "eigenvalue": top.value,
        "residual": top.residual,
    }


def map_of(anchors: Anchors, run: Run, settings: Settings) -> dict[str, Any]:
    """Losses on the plane through the start, its rounding and the deployed model."""
    points = anchors.points
    corners = points["start"], points["start_deployed"], points["trained_deployed"]
    plane = Plane(*corners, measured=len(anchors.quantized))
    places = {name: plane.place(anchors.own(name)) for name in points}
    way = []
    for step, file in kept_codes(run.folder).items() if run.folder is not None else ():
        codes = anchors.quantized.dequantized(read_codes(anchors.quantized, file))
        way.append((step, *plane.place(codes)))
    others = {name: (*plane.place(point), loss) for name, (point, loss) in anchors.others().items()}
    seen = [place[:2] for place in (*places.values(), *others.values())] + [each[1:3] for each in way]
    xs, ys = (_axis([place[side] for place in seen], settings.grid) for side in (0, 1))
    with anchors.losses(bf16=settings.bf16) as losses:
        values = surface(anchors.space, losses, plane, xs, ys)
    found = {"x": xs, "y": ys, "loss": values.tolist(), "places": places, "way": way, "others": others}
    return found | {"runs": sorted(anchors.rounded)}


Part = Callable[[Anchors, Run, Settings], dict[str, Any]]
PARTS: dict[str, Part] = {
    "ends": ends,
    "lines": lines,
    "inward": inward_test,
    "map": map_of,
    "basin": basin,
}


def _between(anchors: Anchors, first: str, last: str) -> torch.Tensor:
    return norm(torch._foreach_sub(anchors.own(last), anchors.own(first)))


def _steps(space: WeightSpace, direction: Direction) -> float:
    """The root mean square of a direction in steps of the grid."""
    return norm(space.per_step(direction)).item() / sqrt(space.size)


def _axis(places: Sequence[float], count: int) -> list[float]:
    low, high = min(places), max(places)
    low, high = low - MARGIN * (high - low), high + MARGIN * (high - low)
    return [low + (high - low) * number / (count - 1) for number in range(count)]

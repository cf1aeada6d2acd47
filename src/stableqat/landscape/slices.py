"""The loss on lines and planes through points of weight space.

Points of a slice share the batches, and no value leaves the device before the last one is known. On a line
`start + t (end - start)`, t = 0 and t = 1 are the very points. A plane lies through three points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stableqat.errors import UserError
from stableqat.landscape.curvature import mean_loss
from stableqat.landscape.space import Losses, Point, WeightSpace, dot, norm


def line(space: WeightSpace, losses: Losses, start: Point, end: Point, shares: Sequence[float]) -> Tensor:
    """The mean loss on the line through two points.

    Args:
        space: The weights, which return to where they are.
        losses: The loss.
        start: The point of share 0.
        end: The point of share 1.
        shares: Where to measure.

    Returns:
        A loss per share.
    """
    found = []
    with space.kept():
        for share in shares:
            space.between(start, end, share)
            found.append(mean_loss(losses))
    return torch.stack(found)


class Plane:
    """The plane through three points, with perpendicular axes of unit length.

    Args:
        origin: The point (0, 0).
        first: A point on the positive first axis.
        second: A point with a positive second coordinate.

    Attributes:
        axes: The two unit directions.

    Raises:
        UserError: If the points lie on a line.
    """

    def __init__(self, origin: Point, first: Point, second: Point) -> None:
        self.origin = origin
        across = torch._foreach_sub(first, origin)
        length = norm(across)
        torch._foreach_div_(across, length)
        upward = torch._foreach_sub(second, origin)
        whole = norm(upward)
        torch._foreach_sub_(upward, torch._foreach_mul(across, dot(upward, across)))
        height = norm(upward)
        if not (length > 0 and height > 1e-4 * whole):
            raise UserError("the three points of a plane lie on one line; take others")
        torch._foreach_div_(upward, height)
        self.axes = (list(across), list(upward))

    def place(self, point: Point) -> tuple[float, float, float]:
        """The coordinates of a point's projection, and the point's distance from the plane."""
        offset = torch._foreach_sub(point, self.origin)
        x, y = (dot(offset, axis) for axis in self.axes)
        away = (norm(offset).square() - x.square() - y.square()).clamp(min=0).sqrt()
        across, upward, distance = torch.stack([x, y, away]).tolist()
        return across, upward, distance


def surface(
    space: WeightSpace, losses: Losses, plane: Plane, xs: Sequence[float], ys: Sequence[float]
) -> Tensor:
    """The mean loss on a plane.

    Args:
        space: The weights, which return to where they are.
        losses: The loss.
        plane: The plane.
        xs: First coordinates, in units of the weights.
        ys: Second coordinates.

    Returns:
        Losses, `(len(ys), len(xs))`.
    """
    across, upward = plane.axes
    found = []
    with space.kept():
        for y in ys:
            for x in xs:
                space.move(plane.origin, (x, across), (y, upward))
                found.append(mean_loss(losses))
    return torch.stack(found).view(len(ys), len(xs))

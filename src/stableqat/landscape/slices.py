"""The loss on lines and planes through points of weight space.

Points of a slice share the batches, and no value leaves the device before the last one is known. On a line
`start + t (end - start)`, t = 0 and t = 1 are the very points. A plane lies through three points.
"""

from collections.abc import Iterable, Sequence
from math import sqrt

import torch
from torch import Tensor

from stableqat.errors import UserError
from stableqat.landscape.curvature import mean_loss
from stableqat.landscape.space import Losses, ParameterSpace, Point, dot, norm


def line(space: ParameterSpace, losses: Losses, start: Point, end: Point, shares: Sequence[float]) -> Tensor:
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

    Lengths and angles are those of the first `measured` tensors. The others are carried along, so that the
    three points are the very points: they are an affine function of the two coordinates.

    Args:
        origin: The point (0, 0).
        first: A point on the positive first axis.
        second: A point with a positive second coordinate.
        measured: How many tensors of a point make its coordinates; None takes all.

    Attributes:
        axes: The two directions.

    Raises:
        UserError: If the points lie on a line.
    """

    def __init__(self, origin: Point, first: Point, second: Point, measured: int | None = None) -> None:
        self.origin, self._measured = origin, len(origin) if measured is None else measured
        across = list(torch._foreach_sub(first, origin))
        length = norm(self._own(across))
        torch._foreach_div_(across, length)
        upward = list(torch._foreach_sub(second, origin))
        whole = norm(self._own(upward))
        for _ in range(2):  # once leaves an error of rounding
            along = dot(self._own(upward), self._own(across))
            torch._foreach_sub_(upward, torch._foreach_mul(across, along))
        height = norm(self._own(upward))
        if not (length > 0 and height > 1e-4 * whole):
            raise UserError("the three points of a plane lie on one line; take others")
        torch._foreach_div_(upward, height)
        self.axes = (across, upward)

    def place(self, point: Iterable[Tensor]) -> tuple[float, float, float]:
        """The coordinates of a point's projection, and the point's distance from the plane.

        Args:
            point: Its measured tensors, which are read one at a time; more are ignored.
        """
        total = torch.zeros(3, dtype=torch.float64, device=self.origin[0].device)
        own = (self._own(each) for each in (self.origin, *self.axes))
        for value, start, *axes in zip(point, *own, strict=False):
            offset = (value - start).flatten()
            products = [torch.dot(offset, each.flatten()) for each in (*axes, offset)]
            total += torch.stack(products)
        across, upward, square = total.tolist()
        return across, upward, sqrt(max(square - across**2 - upward**2, 0.0))

    def _own(self, point: Point) -> Point:
        return point[: self._measured]


def surface(
    space: ParameterSpace, losses: Losses, plane: Plane, xs: Sequence[float], ys: Sequence[float]
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

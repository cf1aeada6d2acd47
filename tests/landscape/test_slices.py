"""Lines and planes through known points of a known loss."""

import pytest
import torch
from quadratic import Quadratic

from stableqat.errors import UserError
from stableqat.landscape.slices import Plane, line, surface
from stableqat.layers.full_precision import full_precision


@pytest.fixture
def toy():
    made = Quadratic()
    with full_precision(made.net):
        yield made


def test_a_line(toy):
    start, end = torch.randn(2, 12, dtype=torch.float64)
    shares = [-0.5, 0.0, 0.3, 1.0, 2.0]
    (before,) = toy.space.get()
    found = line(toy.space, toy.losses, toy.point(start), toy.point(end), shares)
    expected = [toy.value(start + share * (end - start)).item() for share in shares]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(toy.space.get()[0], before)


def test_a_plane_and_the_places_of_points(toy):
    three = torch.randn(3, 12, dtype=torch.float64)
    plane = Plane(*map(toy.point, three))
    origin, first, second = (plane.place(toy.point(each)) for each in three)
    assert origin == (0, 0, 0)
    assert first == pytest.approx(((three[1] - three[0]).norm().item(), 0, 0), abs=1e-6)
    assert second[1] > 0
    assert second[2] == pytest.approx(0, abs=1e-6)
    away = torch.linalg.svd(torch.stack([each[0].flatten() for each in plane.axes]))[2][-1]  # perpendicular
    x, y, distance = plane.place(toy.point(three[2] + 0.25 * away))
    assert (x, y, distance) == pytest.approx((*second[:2], 0.25), abs=1e-6)

    xs, ys = [0.0, first[0], second[0]], [0.0, second[1]]
    found = surface(toy.space, toy.losses, plane, xs, ys)
    corners = found[0, 0], found[0, 1], found[1, 2]
    expected = [toy.value(each).item() for each in three]
    assert [corner.item() for corner in corners] == pytest.approx(expected, rel=1e-5)
    assert found.shape == (2, 3)


def test_three_points_on_a_line_are_refused(toy):
    start, by = torch.randn(2, 12, dtype=torch.float64)
    points = [toy.point(start + share * by) for share in (0, 1, 3)]
    with pytest.raises(UserError, match=r"^the three points of a plane lie on one line"):
        Plane(*points)
    with pytest.raises(UserError, match="on one line"):
        Plane(points[0], points[0], points[1])

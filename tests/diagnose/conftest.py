"""The verb, and what it measures: a language model and a vision transformer in folders, with data."""

import pytest

import starts
from caches import _cache  # noqa: F401
from starts import place  # noqa: F401


@pytest.fixture(scope="package")
def diagnose():
    return starts.verb("diagnose", held_out=2, bits="2,4,8")

"""The verb, and what it rounds: a language model and a vision transformer in folders, with data."""

import pytest

import starts
from caches import _cache  # noqa: F401
from starts import place  # noqa: F401


@pytest.fixture(scope="package")
def ptq():
    return starts.verb("ptq", steps=20, evaluations=30, bits=2)

"""Runs of the command start at the root of the repository, where its configurations lie."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def _at_the_root():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        yield

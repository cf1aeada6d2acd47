"""A fixture that conftests import, so that what `datasets` caches in a test ends with the test."""

import pytest


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")

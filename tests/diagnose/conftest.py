"""A language model and a vision transformer in folders, with data, and the verb."""

import os

import pytest

import starts
from caches import _cache  # noqa: F401

os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # read once, at the import
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

FEW = {"samples": 6, "held_out": 2, "block_size": 16, "bits": "2,4,8", "device": "cpu"}


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    return starts.models_and_data(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="package")
def diagnose():
    """Call the verb; None leaves an option out."""

    def call(source, out, **options):
        from stableqat.cli.main import main

        data = source.parent / ("images" if source.name == "vit" else "text.jsonl")
        options = {"data": data, **FEW, **options}
        flags = [(f"--{key}", *str(value).split()) for key, value in options.items() if value is not None]
        return main(["diagnose", str(source), "--out", str(out), *(each for flag in flags for each in flag)])

    return call

"""A language model and a vision transformer in folders, with data to calibrate them, and the verb."""

import os

import pytest

import starts
from caches import _cache  # noqa: F401

os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # read once, at the import
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

FEW = {"samples": 6, "block_size": 16, "steps": 20, "evaluations": 30, "bits": 2, "device": "cpu"}


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    return starts.models_and_data(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="package")
def ptq():
    """Call the verb; None leaves an option out."""

    def call(source, out, **options):
        from stableqat.cli.main import main

        data = source.parent / ("images" if source.name == "vit" else "text.jsonl")
        options = {"data": data, **FEW, **options}
        pairs = [(f"--{key}", str(value)) for key, value in options.items() if value is not None]
        return main(["ptq", str(source), "--out", str(out), *(each for pair in pairs for each in pair)])

    return call

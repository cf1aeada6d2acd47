"""A full-precision run, a 2-bit run that started from it, and a task of the harness in local files."""

import pytest
import yaml

import tiny
import words
from caches import _cache  # noqa: F401

LLAMA = tiny.LLAMA | {"vocab_size": 300, "max_position_embeddings": 64, "initializer_range": 0.3}


def fit(folder, version, quantizer, init_from, *, verb="fit", **more):
    from stableqat.cli.main import main

    logger = {"save_dir": str(folder / "logs"), "name": "", "version": version, "default_hp_metric": False}
    text = {"source": str(folder / "text.jsonl"), "block_size": 16, "batch_size": 4, "vocab_size": 300}
    settings = {
        "model": {
            "class_path": "stableqat.modules.LlamaModule",
            "init_args": {"config": LLAMA, "quantizer": quantizer, "init_from": init_from, **more},
        },
        "data": {
            "class_path": "stableqat.data.TextDataModule",
            "init_args": text | {"cache_dir": str(folder / "cache")},
        },
        "baseline": {"enabled": False},  # four steps from random weights: no better than chance
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "val_check_interval": 4,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        },
    }
    (folder / f"{version}.yaml").write_text(yaml.safe_dump(settings))
    assert main([verb, "-c", str(folder / f"{version}.yaml")]) == 0
    return folder / "logs" / version


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    words.write_text(folder / "text.jsonl")
    (folder / "further.txt").write_text(" ".join(words.DOCUMENTS[:9]))
    return folder


@pytest.fixture(scope="package")
def start(place):
    return fit(place, "start", None, None)


@pytest.fixture(scope="package")
def run(place, start):
    quantizer = {"class_path": "stableqat.quantizers.StableQAT", "init_args": {"bits": 2}}
    return fit(place, "run", quantizer, str(start))


@pytest.fixture(scope="package")
def with_inputs(place, start):
    quantizer = {"class_path": "stableqat.quantizers.StableQAT", "init_args": {"bits": 2}}
    inputs = {"class_path": "stableqat.quantizers.inputs.LSQ", "init_args": {"bits": 8}}
    return fit(place, "with-inputs", quantizer, str(start), input_quantizer=inputs, cache_bits=4)


@pytest.fixture(scope="package")
def rounded(place, start):
    """The run that a user makes for PTQ figures."""
    quantizer = {"class_path": "stableqat.quantizers.StableQAT", "init_args": {"bits": 2}}
    return fit(place, "rounded", quantizer, str(start), verb="validate")


@pytest.fixture(scope="package")
def exported(place, run):
    from stableqat.cli.main import main

    assert (
        main(["export", str(run), "--format", "hf", "--scale_dtype", "fp32", "--out", str(place / "hf")]) == 0
    )
    return place / "hf"


@pytest.fixture(scope="package")
def tasks(tmp_path_factory):
    """A folder with the task `words`."""
    return words.write_task(tmp_path_factory.mktemp("tasks"))

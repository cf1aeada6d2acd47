"""A language model and a vision transformer in full precision, and runs that were trained from them."""

import pytest
import yaml

import tiny
import words
from caches import _cache  # noqa: F401

LLAMA = tiny.LLAMA | {"vocab_size": 300, "max_position_embeddings": 64, "initializer_range": 0.3}


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landscape")
    words.write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="package")
def fit(place):
    """Train a run of a family for some steps, and return its folder."""

    def train(name, family, quantizer=None, start=None, options=None, **more):
        from stableqat.cli.main import main

        logger = {"save_dir": str(place), "name": "study", "version": name, "default_hp_metric": False}
        init = {"quantizer": quantizer, "init_from": None if start is None else str(start), **(options or {})}
        text = {"source": str(place / "text.jsonl"), "block_size": 16, "batch_size": 4, "vocab_size": 300}
        images = {"batch_size": 16}  # of the embedded digits
        vit = {
            "model_name": "vit_tiny_patch16_224",
            "num_classes": 10,
            "model_args": tiny.VIT,
        }
        cache = {"cache_dir": str(place / "cache")}
        is_text = family == "llama"
        settings = {
            "model": {
                "class_path": f"stableqat.modules.{'LlamaModule' if is_text else 'ViTModule'}",
                "init_args": {**init, **({"config": LLAMA} if is_text else vit)},
            },
            "data": {
                "class_path": f"stableqat.data.{'TextDataModule' if is_text else 'ImageDataModule'}",
                "init_args": text | cache if is_text else images,
            },
            "baseline": {"enabled": False},
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 6,
                "val_check_interval": 6,
                "limit_val_batches": 2,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
            },
            **more,
        }
        (place / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        assert main(["fit", "-c", str(place / f"{name}.yaml"), "--model.optimizer.lr", "0.01"]) == 0
        return place / "study" / name

    return train


def method(name="STE", **options):
    return {"class_path": f"stableqat.quantizers.{name}", "init_args": {"bits": 2, **options}}


@pytest.fixture(scope="package")
def llama(fit):
    """A trained run with its codes, and its start."""
    start = fit("start", "llama")
    kept = {"trajectory": {"every_n_steps": 2, "keep_codes": True, "batches": 1}}
    return fit("run", "llama", method(), start, **kept), start


@pytest.fixture(scope="package")
def vit(fit):
    start = fit("vit-start", "vit")
    return fit("vit-run", "vit", method("ParetoQ", group_size=8), start), start

import json

import pytest
import yaml

LLAMA = {
    "class_path": "stableqat.modules.LlamaModule",
    "init_args": {
        "config": {
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
        "quantizer": {"class_path": "stableqat.quantizers.StableQAT", "init_args": {"bits": 2}},
    },
}
VIT = {
    "class_path": "stableqat.modules.ViTModule",
    "init_args": {
        "model_name": "vit_tiny_patch16_224",
        "num_classes": 10,
        "model_args": {
            "img_size": 8,
            "patch_size": 4,
            "in_chans": 1,
            "embed_dim": 12,
            "depth": 1,
            "num_heads": 1,
        },
    },
}
TRAINER = {
    "accelerator": "cpu",
    "max_steps": 1,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def logger(name):
    kind = "lightning.pytorch.loggers.TensorBoardLogger"
    return {"class_path": kind, "init_args": {"save_dir": "logs", "name": name, "default_hp_metric": False}}


def write(folder, name, **config):
    (folder / name).write_text(yaml.safe_dump(config))


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    """A folder with `llama.yaml`, `vit.yaml`, a text to train on, and caches of its own."""
    folder = tmp_path_factory.mktemp("cli")
    words = [
        "grid",
        "scale",
        "level",
        "bits",
        "round",
        "clamp",
        "weight",
        "latent",
        "threshold",
        "step",
        "rate",
    ]
    documents = [" ".join(words[(n * 5 + k * (n % 7 + 1)) % 11] for k in range(30)) for n in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    text = {
        "source": "text.jsonl",
        "block_size": 16,
        "batch_size": 2,
        "vocab_size": 300,
        "cache_dir": "cache",
    }
    data = {"class_path": "stableqat.data.TextDataModule", "init_args": text}
    write(folder, "llama.yaml", model=LLAMA, data=data, trainer=TRAINER | {"logger": logger("llama")})
    data = {"class_path": "stableqat.data.ImageDataModule", "init_args": {"batch_size": 4}}
    write(folder, "vit.yaml", model=VIT, data=data, trainer=TRAINER | {"logger": logger("vit")})
    return folder


@pytest.fixture
def at(place, monkeypatch):
    """That folder as the current one, with its own cache of data sets."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "datasets")
    return place


@pytest.fixture(scope="package")
def run(place):
    """A run in `logs/llama/done`: one step."""
    from stableqat.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["fit", "-c", "llama.yaml", "--trainer.logger.version", "done"]) == 0
    return "logs/llama/done"

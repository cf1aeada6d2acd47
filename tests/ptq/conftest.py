"""A language model and a vision transformer in folders, with data to calibrate them, and the verb."""

import os

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

import starts
import tiny
import words
from caches import _cache  # noqa: F401

os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # read once, at the import
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

FEW = {"samples": 6, "block_size": 16, "steps": 20, "evaluations": 30, "bits": 2, "device": "cpu"}


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    keys = {key: value for key, value in tiny.LLAMA.items() if key != "model_type"}
    keys |= {"vocab_size": 320, "initializer_range": 0.3, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **keys))
    model.save_pretrained(folder / "llama")
    starts.special(words.DOCUMENTS, 300, "<eos>").save_pretrained(folder / "llama")
    words.write_text(folder / "text.jsonl")
    starts.timm_folder(folder / "vit", classes=3, depth=2)
    for index in range(24):
        (folder / "images" / "abc"[index % 3]).mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (20, 20), (90 * (index % 3), 10 * index, 50))
        picture.paste((255, 9 * index, 0), (index % 7, 3, 12, 15))
        picture.save(folder / "images" / "abc"[index % 3] / f"{index}.png")
    return folder


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

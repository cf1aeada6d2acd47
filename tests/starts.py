"""Pretrained models as users have them: folders of transformers and of timm, tiny."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
import words
from stableqat.data.tokenizer import train_bpe

OTHER = ["another text of other words, zebra quartz jumps " * 3]
NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
OWN = {
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bilinear",
    "crop_pct": 0.7,
    "crop_mode": "squash",
}


def timm_folder(folder: Path, classes: int = 5, **args) -> dict[str, torch.Tensor]:
    folder.mkdir()
    args = {**ARGS, **args}
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=classes, **args)
    state = {key: torch.randn_like(value) * 0.1 + value for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    pretrained = {"input_size": [3, args["img_size"], args["img_size"]], "num_classes": classes, **OWN}
    pretrained |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": NAME, "num_classes": classes, "model_args": args, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    return state


def model_folder(folder: Path, model_type: str = "llama", entries: int = 320) -> Path:
    """A model of transformers with a tokenizer of another text, whose EOS is not the first token."""
    keys = {key: value for key, value in tiny.LLAMA.items() if key != "model_type"} | {
        "vocab_size": entries,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))
    model.save_pretrained(folder)
    special(OTHER, 300, "<eos>").save_pretrained(folder)
    return folder


def special(texts: list[str], entries: int, eos: str):
    """A BPE whose EOS has the highest id."""
    tokenizer = train_bpe(texts, entries)
    tokenizer.add_special_tokens({"eos_token": eos})
    return tokenizer


def models_and_data(folder: Path) -> Path:
    """Folders `llama` and `vit`, and `text.jsonl` and `images` of their kind."""
    keys = {key: value for key, value in tiny.LLAMA.items() if key != "model_type"}
    keys |= {"vocab_size": 320, "initializer_range": 0.3, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **keys))
    model.save_pretrained(folder / "llama")
    special(words.DOCUMENTS, 300, "<eos>").save_pretrained(folder / "llama")
    words.write_text(folder / "text.jsonl")
    timm_folder(folder / "vit", classes=3, depth=2)
    for index in range(24):
        (folder / "images" / "abc"[index % 3]).mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (20, 20), (90 * (index % 3), 10 * index, 50))
        picture.paste((255, 9 * index, 0), (index % 7, 3, 12, 15))
        picture.save(folder / "images" / "abc"[index % 3] / f"{index}.png")
    return folder


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    return models_and_data(tmp_path_factory.mktemp("models"))


def verb(name: str, **few):
    """Call a verb on a model of `place`, with few samples of its data; None leaves an option out."""

    def call(source, out, **options):
        from stableqat.cli.main import main

        data = source.parent / ("images" if source.name == "vit" else "text.jsonl")
        options = {"data": data, "samples": 6, "block_size": 16, "device": "cpu", **few, **options}
        flags = [(f"--{key}", *str(value).split()) for key, value in options.items() if value is not None]
        return main([name, str(source), "--out", str(out), *(each for flag in flags for each in flag)])

    return call

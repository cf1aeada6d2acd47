"""Small runs with random weights: what they answer does not matter, only that all agree."""

from functools import partial

import pytest
import torch

import tiny
import words
from stableqat.data.tokenizer import train_bpe
from stableqat.quantizers import STE
from stableqat.runs import write_run

# so that texts vary
LLAMA = tiny.LLAMA | {"vocab_size": 300, "max_position_embeddings": 64, "initializer_range": 0.4}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    """A run of a 2-bit Llama, with a tokenizer that has a chat template."""
    tokenizer = train_bpe(words.DOCUMENTS, 300)
    tokenizer.chat_template = CHAT
    folder = tmp_path_factory.mktemp("runs") / "llama"
    folder.mkdir()
    module = tiny.configured("llama", config=LLAMA, quantizer=partial(STE, bits=2))
    write_run(folder, module, place=folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="package")
def vit(tmp_path_factory):
    """A run of a 2-bit ViT on the embedded digits."""
    folder = tmp_path_factory.mktemp("runs") / "vit"
    folder.mkdir()
    module = tiny.configured("vit", quantizer=partial(STE, bits=2))
    with torch.no_grad():
        module.model.head.weight.mul_(30)  # probabilities that differ
    data = {"class_path": "stableqat.data.ImageDataModule", "init_args": {}}
    write_run(folder, module, place=folder, data=data)
    return folder

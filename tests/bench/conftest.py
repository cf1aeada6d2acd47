"""A folder with a tiny model of each family and a file of rivals."""

from pathlib import Path

import pytest
import yaml

import tiny

LLAMA = tiny.LLAMA | {"max_position_embeddings": 32}
VIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 1, "num_heads": 1}
RIVALS = '''
"""Linear layers of other people."""
from torch import nn


class Rounded(nn.Linear):
    def forward(self, x):
        step = self.weight.detach().abs().amax(1, keepdim=True) / 7
        rounded = (self.weight / step).round() * step
        return nn.functional.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class Late(nn.Module):
    def forward(self, x):
        raise RuntimeError("no such\\nkernel")


def rounded(linear):
    made = Rounded(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made


def unbuilt(linear):
    raise ValueError("wants 7 bits")


def late(linear):
    return Late()


def forgetful(linear):
    rounded(linear)


STE = rounded
number = 4
'''


@pytest.fixture(scope="package")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for family in ("llama", "vit"):
        (folder / "configs" / family).mkdir(parents=True)
    llama = {"class_path": "stableqat.modules.LlamaModule", "init_args": {"config": LLAMA}}
    vit = {
        "class_path": "stableqat.modules.ViTModule",
        "init_args": {"model_name": "vit_tiny_patch16_224", "num_classes": 10, "model_args": None},
    }
    optimizer = {"optimizer": {"class_path": "torch.optim.SGD"}}  # of no concern to a benchmark
    files = {
        "llama/base": {**llama, "init_args": {**llama["init_args"], **optimizer}},
        "llama/tiny-llama": {"init_args": {"config": LLAMA | {"intermediate_size": 64}}},
        "llama/lean-llama": {"init_args": {"lean_loss": True, "teacher": {"source": "gone"}}},
        "vit/base": vit,
        "vit/tiny-vit": {"init_args": {"model_args": VIT}},
        "vit/whole": vit | {"init_args": {"skip": ["*"], "model_args": VIT}},
    }
    for name, model in files.items():
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump({"model": model}))
    (folder / "rivals.py").write_text(RIVALS)
    (folder / "syntax.py").write_text("def (:")
    (folder / "nothing.yaml").write_text("trainer: {max_steps: 1}\n")
    (folder / "stranger.yaml").write_text("model: {class_path: collections.Counter}\n")
    (folder / "misspelt.yaml").write_text("model: {class_path: LlamaModule, init_args: {confg: {}}}\n")
    (folder / "broken.yaml").write_text("model: [\n")
    return folder


@pytest.fixture
def at(place, monkeypatch) -> Path:
    """That folder as the current one."""
    monkeypatch.chdir(place)
    return place

"""Tiny modules of both families on data from integer formulas, for tests that drive a Trainer themselves."""

from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stableqat.modules import LlamaModule, QATModule, ViTModule
from stableqat.quantizers import DSQ, LRQAT, STE, ParetoQ, StableQAT

METHODS = {
    "fp": None,
    "ste": partial(STE, bits=2),
    "dsq": partial(DSQ, bits=2),
    "paretoq": partial(ParetoQ, bits=2),
    "stableqat": partial(StableQAT, bits=2),
    "lrqat": partial(LRQAT, bits=2),
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}


def module(family: str, method: str = "ste", **options: Any) -> QATModule:
    options.setdefault("quantizer", METHODS[method])
    options.setdefault("optimizer", partial(torch.optim.AdamW, lr=1e-3))
    if family == "llama":
        return LlamaModule(**{"config": LLAMA, **options})
    return ViTModule(
        **{"model_name": "vit_tiny_patch16_224", "num_classes": 10, "model_args": VIT, **options}
    )


def configured(family: str, method: str = "ste", seed: int = 0, **options: Any) -> QATModule:
    made = module(family, method, **options)
    torch.manual_seed(seed)
    made.configure_model()
    return made


def tokens(row: int) -> Tensor:
    """16 tokens below 64, the same on every machine."""
    position = torch.arange(16)
    return (position * position * (row % 5 + 1) + position * (3 * row + 7) + row * row) % 64


def pixels(row: int) -> Tensor:
    """An image (1, 8, 8) with values in [-1, 1)."""
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    return (((row + 3) * x * x + (2 * row + 5) * y + row * x * y) % 32).float()[None] / 16 - 1


def rows(family: str, count: int = 8) -> list[dict[str, Tensor]]:
    if family == "llama":
        return [{"input_ids": tokens(row), "labels": tokens(row)} for row in range(count)]
    return [{"pixel_values": pixels(row), "labels": torch.tensor(row * 7 % 10)} for row in range(count)]


def loader(family: str, count: int = 8, batch_size: int = 8) -> DataLoader:
    return DataLoader(rows(family, count), batch_size=batch_size)  # type: ignore[arg-type]


def batch(family: str, count: int = 8) -> dict[str, Tensor]:
    return next(iter(loader(family, count, count)))


def trainer(**options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 10,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return L.Trainer(**{**defaults, **options})


def calibrated_run(
    module: QATModule, family: str, steps: int, path: Any = None
) -> tuple[L.Trainer, list[float]]:
    """Calibrate, validate and train on batches of 4, or resume from a checkpoint; the trainer and losses."""
    data, losses = loader(family, 16, 4), Losses()
    options = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "max_epochs": 3}
    made = trainer(max_steps=steps, callbacks=[losses], **options)
    torch.manual_seed(0)
    made.fit(module, data, data, ckpt_path=path)
    return made, losses.values


class Losses(L.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.values.append(outputs["loss"].item())

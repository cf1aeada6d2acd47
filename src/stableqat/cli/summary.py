"""The lines at the start and the end of a training: what it is, what came of it, what to do next."""

import logging
import shlex
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from stableqat.callbacks import Baseline, BestCheckpoint
from stableqat.checkpoints.names import consolidated, last_checkpoints
from stableqat.errors import counted
from stableqat.terminal import size
from stableqat.trust import allow_flags

logger = logging.getLogger(__name__)

FORMATS = {"text": "gguf", "images": "onnx"}  # the usual one of a family


class Summary(L.Callback):
    """Say at the start of a training where its folder is, what is trained, and for how long."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the lines."""
        folder = trainer.log_dir  # a broadcast: all processes must ask
        if not trainer.is_global_zero:
            return
        if folder is not None:
            logger.info("run: %s", folder)
            if isinstance(trainer.logger, TensorBoardLogger):  # its runs, and no others
                logger.info("follow: tensorboard --logdir %s", shlex.quote(trainer.logger.root_dir))
        count = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        described = pl_module.describe()
        method = "in full precision"
        if described["method"] != "FP":
            method = f"quantized by {described['method']}, {described['bits']} bits, {described['grid']} grid"
            if "widths" in described:
                method += f", and inputs by {described['input_quantizer']} ({described['widths']})"
        if "attention" in described:
            method += f", and attention's {described['attention']}"
        logger.info("trains: %s parameters, %s", _short(count), method)
        planned = trainer.estimated_stepping_batches
        if 0 < planned < float("inf"):
            first = f" from step {trainer.global_step}" if trainer.global_step else ""
            steps = counted(int(planned), "step")
            logger.info("plan: %s%s%s", steps, _data(trainer, int(planned)), first)


def say_the_end(trainer: L.Trainer, pl_module: Any) -> None:
    """Log what a training has reached, beside its start, and the commands that come next.

    Args:
        trainer: After `fit`.
        pl_module: Its module.
    """
    folder = trainer.log_dir  # a broadcast: all processes must ask
    if not trainer.is_global_zero or folder is None:
        return
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    loss = trainer.callback_metrics.get("val/loss")
    baseline = next((c for c in callbacks if isinstance(c, Baseline)), Baseline(enabled=False))
    if loss is not None:
        logger.info(baseline.in_words(loss.item()))
    best = next((c for c in callbacks if isinstance(c, BestCheckpoint)), None)
    checkpoints = last_checkpoints(Path(folder))
    if best is not None and best.best_model_score is not None and Path(best.best_model_path).exists():
        checkpoints.insert(0, Path(best.best_model_path))
        logger.info("best: %s %.4g, %s", best.monitor, best.best_model_score.item(), checkpoints[0])
    elif checkpoints:
        logger.info("checkpoint: %s", checkpoints[0])
    else:
        return
    files = [file for each in checkpoints for file in (each, *each.rglob("*")) if file.is_file()]
    number = counted(len(checkpoints), "checkpoint")
    logger.info("disk: %s in %s", size(sum(file.stat().st_size for file in files)), number)
    run = str(folder)
    if checkpoints[0].is_dir():  # sharded, which only training reads
        run = str(consolidated(checkpoints[0]))
        logger.info("next: stableqat consolidate %s", shlex.quote(str(checkpoints[0])))
    logger.info("next: stableqat evaluate %s%s", shlex.quote(run), allow_flags())
    # no format holds quantizers of attention
    if pl_module.surgery is not None and pl_module.attention_quantizer is None:
        out = shlex.quote(f"out/{Path(folder).name}")
        made = FORMATS[pl_module.family] if pl_module.input_quantizer is None else "onnx"
        logger.info(
            "next: stableqat export %s --format %s --out %s%s", shlex.quote(run), made, out, allow_flags()
        )


def _data(trainer: L.Trainer, steps: int) -> str:
    """How much data the steps take, after a colon; nothing where the data does not say."""
    data = getattr(trainer, "datamodule", None)
    rows = getattr(data, "batch_size", 0) * trainer.world_size * trainer.accumulate_grad_batches
    tokens = getattr(data, "block_size", None)
    if not rows:
        return ""
    each, what = (rows, "images") if tokens is None else (rows * tokens, "tokens")
    return f" of {_short(each)} {what}, {_short(each * steps)} in all"


def _short(number: int) -> str:
    """A count in three digits, such as 135M."""
    for unit, least in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= least:
            return f"{number / least:.3g}{unit}"
    return str(number)

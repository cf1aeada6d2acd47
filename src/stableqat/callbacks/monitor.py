"""What the quantizers do while they train, layer by layer and over the model.

From a fixed sample of rows (at most 64 a layer; this process's shard under FSDP2):
`flip_rate`, the share of codes that changed in a step (EMA 0.99); `oscillation`, the share that
flipped back against their previous direction (EMA 0.01 of new, Nagel et al. 2022,
arXiv 2203.11086); `clipped`; `scale_drift`, mean |log2(s / s_start)|; `snr_db`, power of the weight
over that of its quantization error; the share of each code (up to 4 bits) and their entropy in bits. It
reads codes and scales only, so it knows no method.
"""

from dataclasses import dataclass
from math import log
from typing import Any

import lightning as L
import torch
from torch import Tensor

from stableqat.quantizers.base import local
from stableqat.surgery import QuantLinear, quantized_layers

MOST_BITS_BY_LEVEL = 4  # wider grids have too many levels for a line each


@dataclass
class _Track:
    codes: Tensor
    direction: Tensor
    oscillation: Tensor
    flip_rate: Tensor
    start_scale: Tensor


class QuantizerMonitor(L.Callback):
    """Log `quant/<layer>/<what>` and the mean over layers, `quant/<what>`.

    Args:
        rows: Rows sampled a layer, spread over the layer's first rows.
        every_n_steps: Steps between log entries; None takes the trainer's `log_every_n_steps`. Flips are
            counted every step.
        per_layer: Log every layer beside the means.
    """

    def __init__(self, rows: int = 64, every_n_steps: int | None = None, per_layer: bool = True) -> None:
        self.rows = slice(0, rows)
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self._layers: dict[str, QuantLinear] = {}
        self._tracks: dict[str, _Track] = {}
        self._start_scales: dict[str, Tensor] = {}
        self._seen_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where codes and scales start."""
        if trainer.is_global_zero and trainer.loggers:
            self._layers = quantized_layers(pl_module)
        for name, layer in self._layers.items():
            quantized = layer.weight_quantizer.quantize(layer.weight, self.rows)
            start = quantized.scale.clone()
            known = self._start_scales.get(name, start)[: len(start)]
            start[: len(known)] = known  # fewer or more rows, if the run resumes in other shards
            zeros = torch.zeros_like(quantized.codes)
            no_flips = torch.zeros((), device=start.device)
            self._tracks[name] = _Track(quantized.codes, zeros, zeros.float(), no_flips, start)
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count flips after every optimizer step, and log now and then."""
        if trainer.global_step == self._seen_step:
            return  # a micro-batch of gradient accumulation
        self._seen_step = trainer.global_step
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = trainer.global_step % every == 0
        metrics: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            measured = self._observe(name, layer, due)
            metrics.update({f"quant/{name}/{what}": value for what, value in measured.items()})
        if due and metrics:
            values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
            means = _means(values)
            for logger in trainer.loggers:
                logger.log_metrics({**means, **(values if self.per_layer else {})}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The scales that training started with."""
        return {"start_scales": {name: track.start_scale for name, track in self._tracks.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._start_scales = state_dict["start_scales"]

    @torch.no_grad()
    def _observe(self, name: str, layer: QuantLinear, due: bool) -> dict[str, Tensor]:
        track, quantizer = self._tracks[name], layer.weight_quantizer
        quantized = quantizer.quantize(layer.weight, self.rows)
        # int16, because a flip across an 8-bit grid does not fit into int8
        direction = (quantized.codes.short() - track.codes.short()).sign_().char()
        back = (direction * track.direction) < 0
        track.oscillation.mul_(0.99).add_(back, alpha=0.01)
        track.flip_rate.mul_(0.99).add_(direction.count_nonzero() / direction.numel(), alpha=0.01)
        track.direction = torch.where(direction == 0, track.direction, direction)
        track.codes = quantized.codes
        if not due:
            return {}
        weight = local(layer.weight)[self.rows].float()
        error = quantized.dequantize().float() - weight
        lowest = -(2 ** (quantized.bits - 1))
        counts = torch.bincount((quantized.codes.int() - lowest).flatten(), minlength=2**quantized.bits)
        share = counts / counts.sum()
        named = quantized.bits <= MOST_BITS_BY_LEVEL
        occupancy = {f"share_of_code_{lowest + i}": s for i, s in enumerate(share)} if named else {}
        return {
            "flip_rate": track.flip_rate,
            "oscillation": track.oscillation.mean(),
            "scale_drift": (quantized.scale / track.start_scale).log2().abs().mean(),
            "snr_db": 10 * torch.log10(weight.square().sum() / error.square().sum()),
            "level_entropy_bits": -torch.special.xlogy(share, share).sum() / log(2),
            **occupancy,
            **quantizer.diagnose(layer.weight, self.rows),
        }


def _means(values: dict[str, float]) -> dict[str, float]:
    by_what: dict[str, list[float]] = {}
    for key, value in values.items():
        by_what.setdefault(key.rsplit("/", 1)[1], []).append(value)
    return {f"quant/{what}": sum(v) / len(v) for what, v in by_what.items()}

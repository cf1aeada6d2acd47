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

from stableqat.quantizers.base import QuantizedWeight, local
from stableqat.surgery import QuantLinear, quantized_layers

MOST_BITS_BY_LEVEL = 4  # wider grids have too many levels for a line each


@dataclass
class _Track:
    """The sampled codes of all layers, one behind the other: a step takes few calls, however many layers."""

    codes: Tensor
    direction: Tensor
    flips: Tensor
    oscillation: Tensor

    @classmethod
    def start(cls, codes: Tensor) -> "_Track":
        zeros = torch.zeros_like(codes)
        return cls(codes, zeros, zeros.float(), zeros.float())

    def step(self, codes: Tensor) -> None:
        # int16, because a flip across an 8-bit grid does not fit into int8
        direction = (codes.short() - self.codes).sign_().to(torch.int8)
        self.flips.lerp_(direction.abs().float(), 0.01)
        self.oscillation.lerp_((direction * self.direction < 0).float(), 0.01)
        self.direction = torch.where(direction == 0, self.direction, direction)
        self.codes = codes


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
        self._track: _Track | None = None
        self._start_scales: dict[str, Tensor] = {}
        self._seen_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where codes and scales start."""
        if trainer.is_global_zero and trainer.loggers:
            self._layers = quantized_layers(pl_module)
        start = {name: self._quantized(layer) for name, layer in self._layers.items()}
        for name, quantized in start.items():
            scale = quantized.scale.clone()
            known = self._start_scales.get(name, scale)[: len(scale)]
            scale[: len(known)] = known  # fewer or more rows, if the run resumes in other shards
            self._start_scales[name] = scale
        if start:
            self._track = _Track.start(torch.cat([q.codes.flatten() for q in start.values()]))
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count flips after every optimizer step, and log now and then."""
        if self._track is None or trainer.global_step == self._seen_step:
            return  # nothing is quantized, or a micro-batch of gradient accumulation
        self._seen_step = trainer.global_step
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        quantized = {name: self._quantized(layer) for name, layer in self._layers.items()}
        self._track.step(torch.cat([q.codes.flatten() for q in quantized.values()]))
        if trainer.global_step % every:
            return
        sizes = [q.codes.numel() for q in quantized.values()]
        flips, oscillations = self._track.flips.split(sizes), self._track.oscillation.split(sizes)
        metrics: dict[str, Tensor] = {}
        for number, (name, of_layer) in enumerate(quantized.items()):
            measured = {"flip_rate": flips[number].mean(), "oscillation": oscillations[number].mean()}
            measured |= self._describe(name, of_layer)
            metrics.update({f"quant/{name}/{what}": value for what, value in measured.items()})
        values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
        means = _means(values)
        for logger in trainer.loggers:
            logger.log_metrics({**means, **(values if self.per_layer else {})}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The scales that training started with."""
        return {"start_scales": self._start_scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._start_scales = state_dict["start_scales"]

    def _quantized(self, layer: QuantLinear) -> QuantizedWeight:
        return layer.weight_quantizer.quantize(layer.weight, self.rows)

    @torch.no_grad()
    def _describe(self, name: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
        layer = self._layers[name]
        weight = local(layer.weight)[self.rows].float()
        error = quantized.dequantize().float() - weight
        lowest = -(2 ** (quantized.bits - 1))
        counts = torch.bincount((quantized.codes.int() - lowest).flatten(), minlength=2**quantized.bits)
        share = counts / counts.sum()
        named = quantized.bits <= MOST_BITS_BY_LEVEL
        occupancy = {f"share_of_code_{lowest + i}": s for i, s in enumerate(share)} if named else {}
        return {
            "scale_drift": (quantized.scale / self._start_scales[name]).log2().abs().mean(),
            "snr_db": 10 * torch.log10(weight.square().sum() / error.square().sum()),
            "level_entropy_bits": -torch.special.xlogy(share, share).sum() / log(2),
            **occupancy,
            **layer.weight_quantizer.diagnose(layer.weight, self.rows),
        }


def _means(values: dict[str, float]) -> dict[str, float]:
    by_what: dict[str, list[float]] = {}
    for key, value in values.items():
        by_what.setdefault(key.rsplit("/", 1)[1], []).append(value)
    return {f"quant/{what}": sum(v) / len(v) for what, v in by_what.items()}

"""What quantizers do in training, per layer and over the model.

Measured on a fixed sample (at most 64 rows and 65,536 weights of a layer, but at least one row; of this
process's shard under FSDP2): `flip_rate`, the share of codes that change in a step (EMA 0.99);
`oscillation`, the share that flip back against their previous direction (EMA 0.99, Nagel et al. 2022, arXiv
2203.11086); `oscillating`, the share of weights of which that average is above 0.005; `frozen`, the share
that `freezing` has frozen; `clipped`, the share of weights outside the grid's range; `scale_drift`, the
mean of |log2(s / s_start)|; `snr_db`, the power of the weight over that of its quantization error; the
share of each code (up to 4 bits), and their entropy in bits. `scale_at_floor` counts, of all the layer's
scales, those at their floor. But for `frozen`, the monitor reads codes and scales only, and is the same for
every method.
"""

from collections.abc import Callable
from functools import partial
from math import gcd, log
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.logger import _add_prefix
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor
from torch.distributed.tensor import DTensor

from stableqat import ops
from stableqat.callbacks.arrival import Deferred, on_its_way
from stableqat.errors import check_range
from stableqat.layers.linear import QuantLinear, quantized_layers
from stableqat.quantizers import Quantizer
from stableqat.quantizers.shard import local

MOST_BITS_BY_LEVEL = 4  # wider grids have too many codes for a line each
ROWS, WEIGHTS = 64, 65_536  # of a layer, sampled at most
OSCILLATES = 0.005  # frequency of flips back above which a weight counts as oscillating, as in the paper

_Measured = tuple[list[str], list[str], Callable[[], Tensor]]  # layers, what was measured, (what, layer)


class _Watch:
    """Layers on one grid, all freezing or none, so that a step takes few calls for any number of layers.

    The sampled rows of all layers form one matrix of blocks with one scale each, `(blocks, length)`.
    """

    def __init__(self, layers: dict[str, QuantLinear], rows: int | None) -> None:
        self.names, self._layers = list(layers), list(layers.values())
        self._rows = [slice(rows or sampled_rows(layer.in_features)) for layer in self._layers]
        # asked in every step, of hundreds of layers
        self._own_latents, self._own_codes = (
            any(_own_rule(layer, method) for layer in self._layers) for method in ("latent", "codes")
        )
        self.grid = self._layers[0].weight_quantizer.grid
        self._known: dict[str, tuple[list[Tensor], list[int], list[Tensor]]] = {}
        weights, scales = self._weights(), self._scales("scale")
        self.device = weights[0].device
        per_scale = [w.numel() // max(s.numel(), 1) for w, s in zip(weights, scales, strict=True)]
        self._length = max(gcd(*per_scale), 1)
        self.scales_of_layer = [s.numel() for s in scales]
        each = [n // self._length for n in per_scale]
        self._blocks = [s * n for s, n in zip(self.scales_of_layer, each, strict=True)]
        self._blocks_of_layer = self._lengths(self._blocks)
        blocks_of_scale = [n for s, n in zip(self.scales_of_layer, each, strict=True) for _ in range(s)]
        self._scale_of_block = self._numbers(blocks_of_scale)
        self._sampled = self._lengths(self.scales_of_layer)
        self._present = self._lengths([scale.numel() for scale in self._all_scales("scale")])
        _, _, self._codes = self.look()
        self._direction = torch.zeros_like(self._codes)
        self._flip_rate = torch.zeros(len(self.names), device=self.device)
        self._frequency = torch.zeros_like(self._codes, dtype=torch.float16)  # of flips back

    def look(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return current weights, scales `(blocks, 1)` and codes."""
        weight = torch.cat(self._weights()).view(-1, self._length)
        scale = self.acting_scales()[self._scale_of_block, None]
        if not self._own_codes:  # one call for all layers
            return weight, scale, ops.quantize_codes(weight, scale, grid=self.grid)
        with torch.no_grad():
            codes = [layer.weight_quantizer.codes(layer.weight) for layer in self._layers]
        return weight, scale, torch.cat(list(map(_flat, codes, self._rows))).view(-1, self._length)

    def acting_scales(self) -> Tensor:
        """Return the scales that the forward uses, layer by layer."""
        return ops.acting_scale(torch.cat(self._scales("scale")), torch.cat(self._scales("scale_floor")))

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count the flips of a step; return what `look` returns."""
        weight, scale, codes = self.look()
        # int16, because a flip across an 8-bit grid does not fit into int8
        direction = (codes.short() - self._codes).sign_().to(torch.int8)
        self._flip_rate.lerp_(self._of_layers(direction.abs().float().mean(1)), 0.01)
        self._frequency.lerp_((direction * self._direction < 0).half(), 0.01)
        self._direction = torch.where(direction == 0, self._direction, direction)
        self._codes = codes
        return weight, scale, codes

    def flips(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of counting flips, by layer."""
        blocks = (each.split(self._blocks) for each in (self._direction, self._frequency))
        values = zip(self.names, self._flip_rate, *blocks, strict=True)
        return {
            name: {"flip_rate": rate.clone(), "direction": direction.flatten(), "frequency": often.flatten()}
            for name, rate, direction, often in values
        }

    def resume_flips(self, known: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `flips`; other shards may have fewer or more rows."""
        shares = zip(self._direction.split(self._blocks), self._frequency.split(self._blocks), strict=True)
        for number, (name, (directions, often)) in enumerate(zip(self.names, shares, strict=True)):
            if name in known:
                self._flip_rate[number] = known[name]["flip_rate"]
                for own, what in ((directions, "direction"), (often, "frequency")):
                    if what in known[name]:
                        value = known[name][what][: own.numel()]
                        own.view(-1)[: len(value)] = value

    def describe(self, weight: Tensor, scale: Tensor, codes: Tensor, start: Tensor) -> dict[str, Tensor]:
        """Return the values to log, one per layer.

        Args:
            weight: From `look`.
            scale: From `look`.
            codes: From `look`.
            start: Scales at the start of training, layer by layer.
        """
        grid = self.grid
        v, (low, high) = weight.float() / scale, grid.bounds("range")
        error = ops.dequantize_codes(codes, scale, grid.zero_point, weight.dtype).float() - weight
        levels, lowest = 2**grid.bits, -(2 ** (grid.bits - 1))
        # bincount waits for the GPU; with few bins, threads of a GPU wait for one another: so block by block
        counts = torch.zeros(len(codes), levels, device=self.device)
        counts.scatter_add_(1, codes.long().sub_(lowest), torch.ones_like(weight, dtype=counts.dtype))
        counts = self._of_layers(counts, "sum")
        share = counts / counts.sum(1, keepdim=True)
        signal, noise = (self._of_layers(x.float().square().sum(1), "sum") for x in (weight, error))
        floors = torch.cat(self._all_scales("scale_floor"))
        at_floor = ops.acting_scale(torch.cat(self._all_scales("scale")), floors) == floors
        drift = (self.acting_scales() / start).log2_().abs_()
        occupancy = {f"share_of_code_{lowest + i}": share[:, i] for i in range(levels)}
        return {
            "flip_rate": self._flip_rate.clone(),
            "oscillation": self._of_layers(self._frequency.float().mean(1)),
            "oscillating": self._of_layers((self._frequency > OSCILLATES).float().mean(1)),
            **self._frozen(),
            "scale_drift": torch.segment_reduce(drift, "mean", lengths=self._sampled, unsafe=True),
            "snr_db": 10 * torch.log10(signal / noise),
            "level_entropy_bits": -torch.special.xlogy(share, share).sum(1) / log(2),
            **(occupancy if grid.bits <= MOST_BITS_BY_LEVEL else {}),
            "clipped": self._of_layers(((v < low) | (v > high)).float().mean(1)),
            "scale_at_floor": torch.segment_reduce(
                at_floor.float(), "sum", lengths=self._present, unsafe=True
            ),
        }

    def _of_layers(self, of_blocks: Tensor, reduce: str = "mean") -> Tensor:
        return torch.segment_reduce(of_blocks, reduce, lengths=self._blocks_of_layer, unsafe=True)

    def _weights(self) -> list[Tensor]:
        if not self._own_latents:
            return self._views("weight", lambda: [layer.weight for layer in self._layers], self._rows)
        with torch.no_grad():
            latents = [layer.weight_quantizer.latent(layer.weight) for layer in self._layers]
        return list(map(_flat, latents, self._rows))

    def _frozen(self) -> dict[str, Tensor]:
        found = [x.weight_quantizer.freezing for x in self._layers if x.weight_quantizer.freezing is not None]
        if not found:
            return {}
        rows = zip(found, self._rows, strict=True)
        frozen = torch.cat([_flat(each.frozen, few) for each, few in rows]).view(-1, self._length)
        return {"frozen": self._of_layers(frozen.float().mean(1))}

    def _scales(self, name: str) -> list[Tensor]:
        return self._views(f"sampled {name}", lambda: self._of_quantizers(name), self._rows)

    def _all_scales(self, name: str) -> list[Tensor]:
        return self._views(name, lambda: self._of_quantizers(name), [slice(None)] * len(self._layers))

    def _of_quantizers(self, name: str) -> list[Tensor]:
        return [getattr(layer.weight_quantizer, name) for layer in self._layers]

    def _views(self, key: str, find: Callable[[], list[Tensor]], rows: list[slice]) -> list[Tensor]:
        """Rows of tensors; to take them anew from hundreds of layers in each step would outlast the step."""
        tensors, places, views = self._known.get(key, ([], [], []))
        if not tensors or [tensor.data_ptr() for tensor in tensors] != places:
            tensors = find()
            views = list(map(_flat, tensors, rows))
            if not any(isinstance(tensor, DTensor) for tensor in tensors):
                self._known[key] = tensors, [tensor.data_ptr() for tensor in tensors], views
        return views

    def _lengths(self, lengths: list[int]) -> Tensor:
        return torch.tensor(lengths, device=self.device)

    def _numbers(self, lengths: list[int]) -> Tensor:
        """0, 1, 2 and so on, each as often as `lengths` says."""
        return torch.arange(len(lengths), device=self.device).repeat_interleave(self._lengths(lengths))


def sampled_rows(features: int) -> int:
    """How many rows of a weight are sampled: more would show no more of its rates, but take longer."""
    return min(ROWS, max(WEIGHTS // features, 1))


def _flat(tensor: Tensor, rows: slice) -> Tensor:
    with torch.no_grad():  # otherwise autograd would take the shard, which takes longer
        own = local(tensor)
    return own.detach()[rows].flatten()


class QuantizerMonitor(L.Callback):
    """Log the mean over layers, `quant/<what>`, and every layer, `layers/<layer>/<what>`.

    Args:
        rows: Rows sampled per layer, the first ones. Null takes 64, or as many as have 65,536 weights.
        every_n_steps: Steps between log entries; 0 logs nothing, null takes the trainer's
            `log_every_n_steps`. Flips are counted in every step.
        per_layer: Whether to log every layer beside the means.

    Raises:
        UserError: If a number is out of range.
    """

    def __init__(
        self, rows: int | None = None, every_n_steps: int | None = None, per_layer: bool = True
    ) -> None:
        check_range("monitor.rows", rows, 1, null=True)
        check_range("monitor.every_n_steps", every_n_steps, 0, null=True)
        self.rows = rows
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self._watches: list[_Watch] = []
        self._start_scales: dict[str, Tensor] = {}
        self._flips: dict[str, dict[str, Tensor]] = {}
        self._seen_step = 0
        self._writing = Deferred()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note codes and scales at the start; continue counting flips from the checkpoint."""
        alike: dict[Any, dict[str, QuantLinear]] = {}
        layers = quantized_layers(pl_module)
        if trainer.loggers and (trainer.is_global_zero or any(map(_gathers, layers.values()))):
            for name, layer in layers.items():
                quantizer = layer.weight_quantizer
                alike.setdefault((quantizer.grid, quantizer.freezing is None), {})[name] = layer
        self._watches = [_Watch(layers, self.rows) for layers in alike.values()]
        for watch in self._watches:
            scales = watch.acting_scales().split(watch.scales_of_layer)
            for name, now in zip(watch.names, scales, strict=True):
                known, scale = self._start_scales.get(name, now).flatten()[: len(now)], now.clone()
                scale[: len(known)] = known  # a run that resumes on other shards has fewer or more rows
                self._start_scales[name] = scale
            watch.resume_flips(self._flips)
        self._seen_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Count flips after every optimizer step; measure every n steps, and log that a step later."""
        self._writing.catch_up()
        every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps  # type: ignore[attr-defined]
        if not self._watches or not every or trainer.global_step == self._seen_step:
            return  # nothing is quantized or logged, or a micro-batch of gradient accumulation
        self._seen_step = trainer.global_step
        looks = [watch.step() for watch in self._watches]
        if trainer.global_step % every:
            return
        measured = []
        for watch, look in zip(self._watches, looks, strict=True):
            start = torch.cat([self._start_scales[name] for name in watch.names])
            values = watch.describe(*look, start)
            measured.append((watch.names, list(values), on_its_way(torch.stack(list(values.values())))))
        self._writing.put_off(partial(self._write, trainer, trainer.global_step, measured))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what the last step measured."""
        self._writing.catch_up()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write what was measured before a run breaks off."""
        self._writing.catch_up()

    def _write(self, trainer: L.Trainer, step: int, measured: list[_Measured]) -> None:
        values: dict[str, dict[str, float]] = {}  # by what, then layer
        for layers, whats, read in measured:
            for what, of_layers in zip(whats, read().tolist(), strict=True):
                values.setdefault(what, {}).update(zip(layers, of_layers, strict=True))
        means = {f"quant/{what}": sum(v.values()) / len(v) for what, v in values.items()}
        single = {f"layers/{name}/{what}": x for what, v in values.items() for name, x in v.items()}
        for logger in trainer.loggers if trainer.is_global_zero else ():
            _log(logger, means, single if self.per_layer else {}, step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to log the same as the uninterrupted one."""
        self._writing.catch_up()
        for watch in self._watches:
            self._flips |= watch.flips()
        return {"start_scales": self._start_scales, "flips": self._flips}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`; checkpoints of earlier versions have no flips."""
        self._start_scales = state_dict["start_scales"]
        self._flips = state_dict.get("flips", {})


def _gathers(layer: QuantLinear) -> bool:
    """Whether to look at a shard takes tensors of other processes, which then must look as well."""
    return isinstance(layer.latent, DTensor) and (_own_rule(layer, "latent") or _own_rule(layer, "codes"))


def _own_rule(layer: QuantLinear, method: str) -> bool:
    """Whether the class of a layer's quantizer overrides a method of `Quantizer`."""
    return getattr(type(layer.weight_quantizer), method) is not getattr(Quantizer, method)


def _log(logger: Logger, means: dict[str, float], single: dict[str, float], step: int) -> None:
    """Log means, and all layers' values as one event; a thousand alone would outlast a step."""
    if not isinstance(logger, TensorBoardLogger):
        logger.log_metrics({**means, **single}, step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    logger.log_metrics(means, step=step)
    tags = _add_prefix(single, logger._prefix, logger.LOGGER_JOIN_CHAR)
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tags.items()]
    if values:
        logger.experiment._get_file_writer().add_summary(Summary(value=values), step)

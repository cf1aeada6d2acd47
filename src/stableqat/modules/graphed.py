"""The loss of a training step as two CUDA graphs: forward and backward are one launch each, not thousands.

Where batches or layers are small, a GPU waits for launches. A graph replays the kernels of one forward or
backward, on memory of its own, whatever Python would do in between; so it serves batches of one shape, and
nothing but batch, weights and random numbers may change from step to step. The kernels are the same, in the
same order: values are bit for bit those of a step launched kernel by kernel.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stableqat.errors import UserError, one_line
from stableqat.layers.hold import release_weights
from stableqat.modules.exchange import GradientExchange
from stableqat.ops.once_differentiable import once_differentiable
from stableqat.quantizers import Quantizer

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]

_WARM_UP = 3
_TIMED = 5
_WORTH = 0.97  # of the time that launches take
_ROOM = 0.4  # of the device's memory: a graph's own comes on top of it


class GraphedLoss:
    """A loss whose forward and backward are replayed for batches shaped like the first.

    Other batches, such as an epoch's last, smaller one, are launched as usual.

    Args:
        model: Its trainable parameters get the gradients.
        loss: The loss of a batch.
        always: Whether to keep the graphs even if they are not faster.
        wrapped: The module as DDP has it, for processes that exchange gradients; None if there is one.
        accumulates: Whether the gradients of a backward have to outlive the next forward, which is replayed
            on the same memory.
        pool: Memory of the graphs, shared with others that are never in use at the same time; None takes its
            own.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Batch], Tensor],
        *,
        always: bool,
        wrapped: DistributedDataParallel | None = None,
        accumulates: Callable[[], bool] = lambda: False,
        pool: Any = None,
    ) -> None:
        self.model, self.loss, self.always = model, loss, always
        self.accumulates, self.pool = accumulates, pool
        self.root = torch.zeros((), requires_grad=True)  # gives the loss a backward
        self._all = list(model.parameters())
        self.parameters = [p for p in self._all if p.requires_grad]
        self.exchange = None if wrapped is None else GradientExchange(wrapped, self.parameters)
        self.batch: Batch | None = None
        self.graphs: _Graphs | None = None
        self._captured: list[tuple[int, bool]] = []

    def __call__(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch, differentiable once."""
        if self.batch is None:
            self.batch = {key: value.clone() for key, value in batch.items()}
            if self.exchange is not None:
                self.exchange.start()
            self._capture()
            self._captured = self._weights()
            if self.graphs is None:
                self.end()
        if self.graphs is not None and self._weights() != self._captured:
            logger.warning(
                "weights were frozen, thawed or moved: steps are launched kernel by kernel from now on"
            )
            self.end()
        if self.graphs is None or not _alike(batch, self.batch):
            return self.loss(batch)
        for key, value in batch.items():
            self.batch[key].copy_(value)
        loss: Tensor = _Replay.apply(self.root, self)
        return loss

    def end(self) -> None:
        """Replay no more: launch, and leave the exchange of gradients to DDP."""
        self.graphs = None
        if self.exchange is not None:
            self.exchange.stop()

    def differentiate(self, scale: Tensor) -> None:
        """Add the gradients to those of the parameters; autograd would take them to each one by one.

        Args:
            scale: The gradient by the loss.
        """
        assert self.graphs is not None
        pairs = zip(self.parameters, self.graphs.gradients, strict=True)
        given = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]
        known = [(p.grad, g) for p, g in given if p.grad is not None and p.grad is not g]
        self.graphs.scale.copy_(scale)
        self.graphs.backward.replay()
        if known:
            torch._foreach_add_(*zip(*known, strict=True))
        keep = self.accumulates()
        for parameter, gradient in given:
            if parameter.grad is None or parameter.grad is gradient:  # one set to zero is what was replayed
                parameter.grad = gradient.clone() if keep else gradient

    def _weights(self) -> list[tuple[int, bool]]:
        """Where each parameter lies and whether it is trained: what a graph holds fast."""
        return [(parameter.data_ptr(), parameter.requires_grad) for parameter in self._all]

    def _capture(self) -> None:
        assert self.batch is not None
        device = self.parameters[0].device
        release_weights(self.model)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.random.fork_rng([device]), _uncached():
                with torch.cuda.stream(stream):
                    self._follow_nothing()
                    for _ in range(_WARM_UP):
                        self._launch()
                    launched = _seconds(self._launch)
                if not self._agree(self.always or _used(device) <= _ROOM):
                    raise _Unfit("it would take too much of the device's memory")
                torch.cuda.empty_cache()  # what launched steps leave there, the graphs can use
                graphs = _Graphs(self.loss, self._gradients, self.batch, stream, self.pool)
                replayed = _seconds(graphs.replay)
        except (RuntimeError, _Unfit) as error:
            reason = one_line(_first(error))
            if self.always:
                raise UserError(f"model.graphed: this step cannot be captured: {reason}") from error
            logger.info("steps are launched kernel by kernel: a graph cannot hold them (%s)", reason)
            return
        finally:
            torch.cuda.current_stream(device).wait_stream(stream)
        times = f"{1e3 * replayed:.1f} ms for forward and backward, {1e3 * launched:.1f} ms launched"
        if self._agree(self.always or replayed < _WORTH * launched):
            self.graphs = graphs
            logger.info("steps are replayed as CUDA graphs: %s", times)
        else:
            logger.info("steps are launched kernel by kernel: as CUDA graphs, %s", times)

    def _follow_nothing(self) -> None:
        """Refuse a loss that depends on how far training is, as its first row's shows."""
        assert self.batch is not None
        with _no_schedule(self.model), torch.compiler.set_stance("force_eager"):
            self.loss({key: value[:1] for key, value in self.batch.items()})

    def _launch(self) -> None:
        assert self.batch is not None
        self._gradients(self.loss(self.batch))

    def _gradients(self, loss: Tensor, scale: Tensor | None = None) -> Sequence[Tensor | None]:
        with nullcontext() if self.exchange is None else self.exchange.overlapping():
            return torch.autograd.grad(loss, self.parameters, scale, allow_unused=True)

    def _agree(self, yes: bool) -> bool:
        """Whether all processes say yes: what one replays, the others have to."""
        return yes if self.exchange is None else self.exchange.agree(yes)


class _Graphs:
    """The captured forward and backward, and the tensors that they read and write."""

    def __init__(
        self,
        loss: Callable[[Batch], Tensor],
        gradients: Callable[[Tensor, Tensor], Sequence[Tensor | None]],
        batch: Batch,
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # the loader's thread may pin memory meanwhile
        with torch.cuda.graph(self.forward, pool, stream, capture_error_mode="thread_local"):
            self.loss = loss(batch)
        self.scale = torch.ones_like(self.loss)
        pool = self.forward.pool()
        with torch.cuda.graph(self.backward, pool, stream, capture_error_mode="thread_local"):
            self.gradients = gradients(self.loss, self.scale)
        self.loss = self.loss.detach()

    def replay(self) -> None:
        """Run both."""
        self.forward.replay()
        self.backward.replay()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, graphed: GraphedLoss) -> Tensor:
        assert graphed.graphs is not None
        graphed.graphs.forward.replay()
        ctx.graphed = graphed
        return graphed.graphs.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        ctx.graphed.differentiate(scale)
        return None, None


def why_not_graphed(trainer: L.Trainer, module: Any) -> str | None:
    """Say why the steps of a run cannot be replayed, as far as is known before the first step."""
    if trainer.strategy.root_device.type != "cuda":
        return "it needs a CUDA device"
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        return "it works in a run of one process, or with --trainer.strategy ddp"
    if isinstance(trainer.strategy, DDPStrategy) and trainer.accumulate_grad_batches != 1:
        return "processes that exchange gradients cannot accumulate them"
    if module.activation_checkpointing:
        return "it does not go with activation_checkpointing"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters()):
        return "a parameter has a hook for its gradient, which a graph would not call"
    return None


def _first(error: BaseException) -> BaseException:
    """The error that broke a capture, which the end of the capture hides behind another."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class _Unfit(Exception):
    """Why this step is not captured."""


class _Unread:
    @property
    def progress(self) -> float:
        raise _Unfit("a quantizer follows the progress of training, which a graph would not")


@contextmanager
def _no_schedule(model: nn.Module) -> Iterator[None]:
    """Refuse quantizers that ask how far training is."""
    quantizers = [each for each in model.modules() if isinstance(each, Quantizer)]
    positions = [each.position for each in quantizers]
    for each in quantizers:
        each.position = _Unread()  # type: ignore[assignment]
    try:
        yield
    finally:
        for each, position in zip(quantizers, positions, strict=True):
            each.position = position


@contextmanager
def _uncached() -> Iterator[None]:
    """The autocast region around, without its cache: what is in it would not be computed again."""
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
        yield


def _alike(batch: Batch, other: Batch) -> bool:
    return batch.keys() == other.keys() and all(
        value.shape == other[key].shape and value.dtype == other[key].dtype for key, value in batch.items()
    )


def _used(device: torch.device) -> float:
    """The largest share of a device's memory that has been in use."""
    return torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory


def _seconds(work: Callable[[], None]) -> float:
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_TIMED):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / _TIMED

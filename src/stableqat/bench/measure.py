"""Time and memory of all arms in one run, in turn pass by pass, so a drift of the machine affects all alike.

Between passes gradients are dropped and every weight is overwritten with its own value, so that nothing
computed from it can be reused, as after an optimizer's step. Modes: `eager`; `compiled`, block by block, as
`fit` does on several GPUs; `graphed`, compiled blocks whose forward and backward are replayed as CUDA graphs,
as `fit` does on one. Arms share weights, optimizer states and, when graphed, the graphs' memory.
"""

import gc
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from stableqat.bench.arms import Arm, reason
from stableqat.bench.workload import Batch, Workload
from stableqat.modules.compiled import compile_blocks
from stableqat.modules.graphed import GraphedLoss

Mode = Literal["eager", "compiled", "graphed"]
Tell = Callable[[str], None]
KEYS = ("forward_ms", "backward_ms", "forward_backward_ms", "step_ms")

_WARM_UP = 3
_MOST_WARM_UP = 20
_LEARNING_RATE = 1e-5


def measure(
    mode: Mode, arms: Sequence[Arm], workload: Workload, inputs: Sequence[Batch], rounds: int, tell: Tell
) -> dict[str, dict[str, Any]]:
    """Run every arm once per round; each round starts with the next arm.

    Args:
        mode: How the arms run.
        arms: The arms; the untouched model first.
        workload: Their loss.
        inputs: Batches, used in turn over the rounds.
        rounds: Timed passes per arm.
        tell: Reports progress.

    Returns:
        By arm: milliseconds by round (null if the mode cannot tell them), `peak_bytes` (null on a CPU) and
        `state_bytes`, or `failed` with the reason.
    """
    results: dict[str, dict[str, Any]] = {}
    runners: dict[str, Stepped] = {}
    for arm in arms:
        results[arm.name] = {"path": arm.path} | ({"failed": arm.failure} if arm.failure else {})
    arms = [arm for arm in arms if not arm.failure]
    with _executor(mode, workload, arms) as runner_of:
        for arm in arms:
            began = time.monotonic()
            with _surviving(arm, runners, results[arm.name]):
                runners[arm.name] = runner_of(arm, inputs)
            failure = results[arm.name].get("failed")
            tell(f"{mode}: {arm.name} {failure or f'is warm after {time.monotonic() - began:.1f} s'}")
        passes: dict[str, list[dict[str, float]]] = defaultdict(list)
        graphs = _graphs()
        for number in range(rounds):
            turn = number % len(arms)
            for arm in [*arms[turn:], *arms[:turn]]:
                if arm.name in runners:
                    with _surviving(arm, runners, results[arm.name]):
                        passes[arm.name].append(runners[arm.name].time(inputs[number % len(inputs)]))
        if _graphs() != graphs:
            tell(f"{mode}: something was recompiled during the rounds; check the spread")
        for name in runners:
            times = {key: [done[key] for done in passes[name]] for key in passes[name][0]}
            results[name] |= dict.fromkeys(KEYS) | times
            results[name] |= {key: getattr(runners[name], key) for key in ("peak_bytes", "state_bytes")}
        runners.clear()  # and with them their memory
    _collect(workload.device)
    tell(f"{mode}: {rounds} rounds done")
    return results


class Stepped:
    """An arm that trains: forward with the loss, backward, and the optimizer's step.

    Args:
        arm: The arm.
        workload: Its loss.
        inputs: Batches to warm up with.
        states: Optimizer states by Parameter, which the arms share.
        pool: Memory of the CUDA graphs that replay forward and backward; the arms share it, because they run
            one after another and nothing reads what they leave there. None launches kernel by kernel.

    Attributes:
        peak_bytes: Peak memory of a pass, with the arm's own parameters and without optimizer states.
        state_bytes: Memory of the arm's parameters, buffers and optimizer states, also on a CPU.
    """

    def __init__(
        self, arm: Arm, workload: Workload, inputs: Sequence[Batch], states: dict[Any, Any], pool: Any
    ) -> None:
        assert arm.model is not None
        model, device = arm.model, workload.device
        self.device = device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.loss: Callable[[Batch], Tensor] = partial(workload.loss, model)
        if pool is not None:
            self.loss = GraphedLoss(model, self.loss, always=True, pool=pool)
        with _peak(workload, model) as peak:
            self._pass(inputs[0])  # graphs take their memory now
        self._warm_up(inputs[0])
        if pool is None:
            with _peak(workload, model) as peak:
                self._pass(inputs[0])
        self.peak_bytes = peak[0]
        fused = True if device.type == "cuda" else None
        self.optimizer = torch.optim.AdamW(self.parameters, lr=_LEARNING_RATE, fused=fused)
        self.optimizer.state = states  # type: ignore[assignment]
        self.time(inputs[0])
        own = [t for p in self.parameters for t in states[p].values() if isinstance(t, Tensor)]
        self.state_bytes = _bytes([*model.parameters(), *model.buffers(), *own])

    def time(self, batch: Batch) -> dict[str, float]:
        """Time one training step."""
        losses: list[Tensor] = []

        def compute() -> None:
            losses.append(self.loss(batch))

        _renew(self.parameters)
        work = (compute, lambda: losses.pop().backward(), self.optimizer.step)
        forward, backward, step = timed(self.device, *work)
        _drop_gradients(self.parameters)
        values = (forward, backward, forward + backward, forward + backward + step)
        return dict(zip(KEYS, values, strict=True))

    def _pass(self, batch: Batch) -> None:
        _renew(self.parameters)
        self.loss(batch).backward()
        _drop_gradients(self.parameters)

    def _warm_up(self, batch: Batch) -> None:
        """Run until nothing is compiled any more."""
        steady, graphs = 0, -1
        for _ in range(_MOST_WARM_UP):
            self._pass(batch)
            steady = steady + 1 if _graphs() == graphs else 0
            graphs = _graphs()
            if steady >= _WARM_UP:
                break


@contextmanager
def _executor(mode: Mode, workload: Workload, arms: Sequence[Arm]) -> Iterator[Callable[..., Stepped]]:
    """Yield what makes an arm run in this mode."""
    states: dict[Any, Any] = defaultdict(dict)
    pools = [torch.cuda.graph_pool_handle() if mode == "graphed" else None]

    def runner_of(arm: Arm, inputs: Sequence[Batch]) -> Stepped:
        try:
            return Stepped(arm, workload, inputs, states, pools[-1])
        except Exception:
            if mode == "graphed":
                pools.append(torch.cuda.graph_pool_handle())  # a failed capture may leave its pool open
            raise

    torch.compiler.reset()
    blocks = [list(workload.module.blocks(arm.model)) for arm in arms if arm.model and mode != "eager"]
    for each in blocks:
        compile_blocks(each, required=False)  # a rival may not compile
    yield runner_of
    for block in chain(*blocks):
        vars(block)["forward"] = vars(block)["forward"].plain
    torch.compiler.reset()


@contextmanager
def _surviving(arm: Arm, runners: dict[str, Any], result: dict[str, Any]) -> Iterator[None]:
    """End an arm on too little memory or a rival's error; any other error ends the run."""
    try:
        yield
        return
    except Exception as error:
        if not (arm.rival or _out_of_memory(error)):
            raise
        result["failed"] = reason(error)
        traceback.clear_frames(error.__traceback__)  # they hold tensors
    runners.pop(arm.name, None)
    assert arm.model is not None
    _drop_gradients(arm.model.parameters())
    _collect(next(arm.model.parameters()).device)


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether too little memory is what an error comes from."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def _peak(workload: Workload, model: nn.Module) -> Iterator[list[int | None]]:
    """Yield a list that holds, afterwards, the peak of what is allocated inside plus the tensors of `model`.

    What other arms keep on the device does not count.
    """
    peak: list[int | None] = [None]
    if workload.device.type != "cuda":
        yield peak
        return
    _collect(workload.device)
    before = torch.cuda.memory_allocated(workload.device)
    torch.cuda.reset_peak_memory_stats(workload.device)
    yield peak
    torch.cuda.synchronize(workload.device)
    tensors = [*model.parameters(), *model.buffers()]
    peak[0] = torch.cuda.max_memory_allocated(workload.device) - before + _bytes(tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors, once where they share it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _renew(parameters: Iterable[nn.Parameter]) -> None:
    """Overwrite each weight with its own value, so that it counts as changed."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1)


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _collect(device: torch.device) -> None:
    gc.collect()
    _synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _graphs() -> int:
    """Count the graphs compiled so far."""
    return counters["stats"]["unique_graphs"]


def timed(device: torch.device, *work: Callable[[], Any]) -> list[float]:
    """Run work in turn; return the milliseconds of each piece, by the device's own clock if it has one."""
    on_gpu = device.type == "cuda"
    marks: list[Any] = []
    _synchronize(device)
    for each in (lambda: None, *work):
        each()
        marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            marks[-1].record()
    _synchronize(device)
    return [start.elapsed_time(end) if on_gpu else 1e3 * (end - start) for start, end in pairwise(marks)]

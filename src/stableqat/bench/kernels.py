"""Fake quantization alone, beside a copy: the share of the memory's bandwidth that its kernels reach.

A perfect kernel reads each input once and writes each output once, so a plain copy bounds it. Each repetition
of forward, backward and copy uses another buffer, larger than the caches, inside one CUDA graph, so Python
and launches do not count.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stableqat.bench.measure import timed
from stableqat.quantizers import Quantizer, QuantizerFactory

SHAPE = (8192, 8192)
_BUFFERS = 3
_REPETITIONS = 6
_ROUNDS = 20
_COMPUTE = torch.bfloat16

Work = Callable[[int], object]


def measure_kernels(methods: dict[str, QuantizerFactory], device: torch.device) -> dict[str, Any]:
    """Time each method's forward and backward from float32 weights to bfloat16, with one scale per row.

    Args:
        methods: Quantizers by name; those that do not round the weight itself are left out.
        device: A CUDA device.

    Returns:
        `shape`, `copy`, and by method `forward` and `backward`: each with the `bytes` that have to move and
        the `ms` of each round.
    """
    generator = torch.Generator(device).manual_seed(0)
    weights = [_random(generator).mul_(0.02) for _ in range(_BUFFERS)]
    upstream = [_random(generator).to(_COMPUTE) for _ in range(_BUFFERS)]
    copies = [torch.empty_like(weight) for weight in weights]
    full, compute = weights[0].nbytes, upstream[0].nbytes
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    graphs = {("copy", ""): _captured(lambda i: copies[i].copy_(weights[i]), stream, pool)}
    for name, factory in methods.items():
        kernel = _Kernel(factory, weights, upstream)
        if not kernel.rounds_weight:
            continue
        graphs["forward", name] = _captured(kernel.forward, stream, pool)
        with torch.cuda.stream(stream):  # a backward runs where its forward ran
            kernel.keep_outputs()
        graphs["backward", name] = _captured(kernel.backward, stream, pool)

    times: dict[tuple[str, str], list[float]] = {key: [] for key in graphs}
    keys = list(graphs)
    for number in range(_ROUNDS):
        turn = number % len(keys)
        for key in [*keys[turn:], *keys[:turn]]:
            times[key] += [ms / _REPETITIONS for ms in timed(device, graphs[key].replay)]

    moved = {"copy": 2 * full, "forward": full + compute, "backward": full + compute + full}
    result: dict[str, Any] = {"shape": list(SHAPE), "forward": {}, "backward": {}}
    for (what, name), ms in times.items():
        record = {"bytes": moved[what], "ms": ms}
        if name:
            result[what][name] = record
        else:
            result[what] = record
    return result


def _random(generator: torch.Generator) -> Tensor:
    return torch.randn(SHAPE, device=generator.device, generator=generator)


class _Kernel:
    """A method's quantizer on several weights, forward and backward apart."""

    def __init__(
        self, factory: QuantizerFactory, weights: Sequence[Tensor], upstream: Sequence[Tensor]
    ) -> None:
        self.quantizer = factory(weights[0])
        self.rounds_weight = type(self.quantizer).latent is Quantizer.latent
        self.learned = [p for p in self.quantizer.parameters() if p.requires_grad]
        self.weights = [weight.detach().requires_grad_() for weight in weights]
        self.upstream = upstream
        self.outputs: list[Tensor] = []

    def keep_outputs(self) -> None:
        self.outputs = [self._fake_quantize(weight) for weight in self.weights]

    @torch.no_grad()
    def forward(self, i: int) -> Tensor:
        return self._fake_quantize(self.weights[i])

    def backward(self, i: int) -> tuple[Tensor, ...]:
        leaves = [self.weights[i], *self.learned]
        return torch.autograd.grad(self.outputs[i], leaves, self.upstream[i], retain_graph=True)

    def _fake_quantize(self, weight: Tensor) -> Tensor:
        with torch.autocast("cuda", _COMPUTE):
            return self.quantizer(weight)


def _captured(work: Work, stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(_BUFFERS):
            work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        kept: list[object] = [None] * _BUFFERS  # as many outputs as inputs, used in turn
        for number in range(_REPETITIONS):
            kept[number % _BUFFERS] = work(number % _BUFFERS)
    return graph

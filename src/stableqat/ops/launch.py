"""How the Triton kernels are launched: the arguments of each, at little cost for the host.

Triton looks at every argument of every launch, which takes longer than these kernels do on a small weight.
Here a kernel is compiled for stand-ins of its tensors and launched with bare addresses. The variant that a
launch needs follows from values (shapes, types, grid, surrogate), so caches are keyed by value: no launch
depends on where a tensor lay before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import pi, sqrt
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import Parameter
from triton.runtime.jit import MockTensor

from stableqat.ops import kernels
from stableqat.ops.grids import Grid
from stableqat.ops.surrogates import Surrogate, of_kernel

FORWARD_TILE = 2048  # elements that a program handles at a time; the fastest size measured
BACKWARD_TILE = 1024
WARPS = 4
SPLIT = 32 * BACKWARD_TILE  # elements of one scale after which its sum is spread over programs


@dataclass(frozen=True, eq=False)
class Call:
    """A kernel with everything that its launch takes besides tensors.

    Attributes:
        kernel: Takes tensors, numbers and constants, in this order.
        programs: Number of programs.
        numbers: Numbers by position.
        constants: Constants by name.
        columns: How many of the kernel's first arguments are tuples with one tensor per weight.
    """

    kernel: Any
    programs: int
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]
    columns: int = 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Where several weights lie in one launch and in its buffers, a function of their sizes.

    Attributes:
        grid: Their grid.
        rows: Number of scales of each.
        n: Number of elements of each that share a scale.
        starts: Where the elements of each begin in a buffer, followed by the length of the buffer.
        sums: Where the scales of each begin in a buffer, followed by the length of the buffer.
    """

    grid: Grid
    rows: tuple[int, ...]
    n: tuple[int, ...]
    starts: tuple[int, ...]
    sums: tuple[int, ...]


@cache
def layout_of(sizes: tuple[tuple[int, int], ...], grid: Grid) -> Layout | None:
    """The layout of weights with these numbers of elements and scales; None if they cannot share a launch."""
    rows = tuple(scales for _, scales in sizes)
    n = tuple(elements // scales for elements, scales in sizes)
    if any(each % 16 or each > SPLIT for each in n):
        return None
    starts = accumulate((elements for elements, _ in sizes), initial=0)
    return Layout(grid, rows, n, tuple(starts), tuple(accumulate(rows, initial=0)))


@cache
def forward_call(rows: int, n: int, grid: Grid, floor: bool) -> Call:
    """`kernels.forward_kernel` for one weight."""
    constants = _forward_constants(n, grid, floor)
    programs = triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(n, constants["COLUMNS"])
    return Call(kernels.forward_kernel, programs, (0, rows, n), constants)


@cache
def backward_call(rows: int, n: int, grid: Grid, surrogate: Surrogate, floor: bool, value: bool) -> Call:
    """`kernels.backward_kernel` for one weight."""
    constants, splits = _backward_constants(n, grid, surrogate, floor, value), triton.cdiv(n, SPLIT)
    numbers = (0, rows, n, splits, _grad_scale(n, grid))
    return Call(kernels.backward_kernel, triton.cdiv(rows, constants["ROWS"]) * splits, numbers, constants)


@cache
def forward_many_call(layout: Layout, floor: bool) -> Call:
    """`kernels.forward_many_kernel` for a layout."""
    constants = _forward_constants(max(layout.n), layout.grid, floor)
    programs = [
        triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(n, constants["COLUMNS"])
        for rows, n in zip(layout.rows, layout.n, strict=True)
    ]
    places = _places(layout, programs)
    return Call(kernels.forward_many_kernel, sum(programs), (), {**places, **constants}, columns=3)


@cache
def backward_many_call(layout: Layout, surrogate: Surrogate, floor: bool) -> Call:
    """`kernels.backward_many_kernel` for a layout."""
    constants = _backward_constants(max(layout.n), layout.grid, surrogate, floor, False)
    programs = [triton.cdiv(rows, constants["ROWS"]) for rows in layout.rows]
    places = _places(layout, programs)
    places["SUMS"] = layout.sums[:-1]
    places["GRAD_SCALE"] = tuple(_grad_scale(n, layout.grid) for n in layout.n)
    return Call(kernels.backward_many_kernel, sum(programs), (), {**places, **constants}, columns=5)


def _places(layout: Layout, programs: Sequence[int]) -> dict[str, Any]:
    return {
        "COUNT": len(programs),
        "FIRST": tuple(accumulate(programs[:-1], initial=0)),
        "ROWS_OF": layout.rows,
        "N_OF": layout.n,
        "START": layout.starts[:-1],
    }


def traced(tensor: Tensor) -> bool:
    """Whether a tensor stands for one in a graph that is being traced."""
    return type(tensor) not in (Tensor, Parameter)


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may read the tensors in whole vectors."""
    return not any([tensor.data_ptr() & 15 for tensor in tensors])


def launch(call: Call, *tensors: Tensor) -> None:
    """Run a kernel on tensors of one device, also in a graph that is being traced."""
    first, in_graph = tensors[0], traced(tensors[0])
    if kernels.NATIVE and not in_graph and not torch.compiler.is_compiling():
        if aligned(tensors):
            types = tuple([tensor.dtype for tensor in tensors])
            run(call, first.device, types, tuple([tensor.data_ptr() for tensor in tensors]))
            return
        if first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return launch(call, *tensors)
    kernel = wrap_triton(call.kernel) if in_graph else call.kernel
    kernel[(call.programs,)](*tensors, *call.numbers, **call.constants, num_warps=WARPS)


def run(call: Call, device: torch.device, types: tuple[torch.dtype, ...], pointers: tuple[Any, ...]) -> None:
    """Run a kernel on aligned tensors.

    Args:
        call: The kernel.
        device: The device that the tensors are on.
        types: Type of each argument.
        pointers: The `pointer` of each argument, in a tuple where the kernel takes one.
    """
    if not kernels.NATIVE:
        call.kernel[(call.programs,)](*pointers, *call.numbers, **call.constants)
    elif device.index == torch.cuda.current_device():
        launcher, rest = _compiled(call, device.index, types)
        launcher(*pointers, *rest)
    else:
        with torch.cuda.device(device):
            run(call, device, types, pointers)


def pointer(tensor: Tensor) -> Any:
    """A tensor as `run` takes it: its address, or the tensor itself for Triton's interpreter."""
    return tensor.data_ptr() if kernels.NATIVE else tensor


@cache
def _compiled(
    call: Call, device: int, types: tuple[torch.dtype, ...]
) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The launcher of a kernel compiled for the current device, and its arguments after the addresses."""
    stand_ins = [
        tuple([MockTensor(dtype)] * call.constants["COUNT"]) if place < call.columns else MockTensor(dtype)
        for place, dtype in enumerate(types)
    ]
    grid, arguments = (call.programs, 1, 1), (*stand_ins, *call.numbers)
    compiled = call.kernel.warmup(*arguments, **call.constants, grid=grid, num_warps=WARPS)
    names = call.kernel.arg_names[len(arguments) :]
    return compiled[grid], (*call.numbers, *[call.constants[name] for name in names])


def _tile(n: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile, both powers of two."""
    columns = min(triton.next_power_of_2(n), elements)
    return elements // columns, columns


def _grad_scale(n: int, grid: Grid) -> float:
    return 1 / sqrt(n * max(grid.q_max, 1))


def _forward_constants(n: int, grid: Grid, floor: bool) -> dict[str, Any]:
    rows, columns = _tile(n, FORWARD_TILE)
    return {
        "Q_MIN": grid.q_min,
        "Q_MAX": grid.q_max,
        "ZERO_POINT": grid.zero_point,
        "FLOOR": floor,
        "NATIVE": kernels.NATIVE,
        "ROWS": rows,
        "COLUMNS": columns,
    }


def _backward_constants(n: int, grid: Grid, surrogate: Surrogate, floor: bool, value: bool) -> dict[str, Any]:
    low, high = grid.bounds(surrogate.mask)
    rows, columns = _tile(n, BACKWARD_TILE)
    return {
        **_forward_constants(n, grid, floor),
        "ROWS": rows,
        "COLUMNS": columns,
        "SPLIT": SPLIT,
        "LOW": max(low, -3e38),
        "HIGH": min(high, 3e38),
        "MASKED": surrogate.mask != "none",
        "BINARY": grid.name == "binary",
        **surrogate_constants(surrogate),
        "VALUE": value,
    }


def surrogate_constants(surrogate: Surrogate) -> dict[str, Any]:
    """How a backward kernel is told the surrogate."""
    kernel = surrogate.kernel
    assert kernel is not None
    of_kernel(kernel, surrogate.mask)  # refuses a form that no kernel has
    strength, harmonics = (*kernel.numbers, 0.0, 0)[:2]
    if kernel.name == "fourier":
        strength = strength * sqrt(2) * pi
    return {"KIND": kernel.name, "STRENGTH": strength, "HARMONICS": harmonics}

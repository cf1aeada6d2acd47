"""What processes send one another decodes to the fake-quantized weight, bit for bit."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE

from stableqat.ops import Fourier, Operands, Wire, decode, encode, fake_quantize, make_grid, pull_back, wire

GRIDS = [("binary", 1), ("ternary", 2), ("integer", 2), ("stretched", 2), ("integer", 3), ("stretched", 3)]
GRIDS += [("integer", 4), ("stretched", 5), ("integer", 8), ("stretched", 8)]


def weight(out: int, columns: int, groups: int, seed: int = 0) -> Operands:
    """Weights beyond the grid on both sides, scales of both signs, half of them under their floors."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.rand(out, groups, generator=random) + 0.05
    scale[1::3] *= -1
    floor = scale * torch.where(torch.rand(out, groups, generator=random) < 0.5, 0.9, 1.5)
    x = torch.randn(out, columns, generator=random) * 3
    return Operands(x.to(DEVICE), scale.to(DEVICE), floor.to(DEVICE))


def rows_of(operands: Operands, rows: int, process: int) -> Operands:
    return Operands(*[None if each is None else each[process * rows :][:rows] for each in operands])


def sent(operands: Operands, grid, processes: int, dtype=torch.float32):
    """What the processes send, and the value that each makes of it."""
    out, columns = operands.x.shape
    layout = Wire(grid, -(-out // processes), columns, operands.scale.shape[1])
    buffers = [encode(rows_of(operands, layout.rows, process), layout) for process in range(processes)]
    assert {buffer.shape for buffer in buffers} == {(layout.size,)}
    value = torch.full((out, columns), torch.nan, dtype=dtype, device=DEVICE)
    decode(torch.cat(buffers), layout, value)
    return buffers, value


shapes = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 21), st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(GRIDS), shapes, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_what_arrives_is_the_fake_quantized_weight(kind, shape, dtype, seed):
    out, groups, per_scale, processes = shape
    grid, operands = make_grid(*kind), weight(out, groups * per_scale, groups, seed)
    expected = fake_quantize(
        operands.x, operands.scale, scale_floor=operands.scale_floor, grid=grid, surrogate=Fourier()
    )
    _, value = sent(operands, grid, processes, dtype)
    assert torch.equal(value, expected.to(dtype))


@pytest.mark.parametrize(("kind", "width"), [(GRIDS[0], 1), (GRIDS[3], 2), (GRIDS[4], 4), (GRIDS[7], 8)])
def test_bytes_per_weight(kind, width):
    layout = Wire(make_grid(*kind), rows=64, columns=2048, groups=16)
    assert layout.size == 64 * 2048 * width // 8 + 64 * 16 * 4


LLAMA_1B = 16 * [
    (2048, 2048),
    (512, 2048),
    (512, 2048),
    (2048, 2048),
    (8192, 2048),
    (8192, 2048),
    (2048, 8192),
]


@pytest.mark.parametrize(
    ("row", "bits", "group"),
    [
        ("8-bit codes, a scale per row", 8, None),
        ("3- and 4-bit codes", 3, None),
        ("3- and 4-bit codes", 4, None),
        ("2-bit codes and ternary", 2, None),
        ("1-bit codes", 1, None),
        ("2-bit codes, groups of 128", 2, 128),
        ("2-bit codes, groups of 32", 2, 32),
    ],
)
def test_the_documented_bytes(row, bits, group):
    grid = make_grid("binary" if bits == 1 else "integer", bits)
    layouts = [Wire(grid, out // 2, size, size // group if group else 1) for out, size in LLAMA_1B]
    sent, whole = 2 * sum(each.size for each in layouts), 4 * sum(out * size for out, size in LLAMA_1B)
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert f"| {row} | {sent / 1e9:.2f} GB | 1/{whole / sent:.1f} | {sent / 50e6:.1f} ms |" in page
    assert f"| {whole / 1e9:.2f} GB | 1 | {whole / 50e6:.1f} ms |" in page


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels serve the tests above")
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(
    "shape", [(7, 33, 1, 2), (8, 64, 2, 3), (1, 5, 5, 1), (130, 96, 3, 2), (3, 5000, 1, 1)]
)
def test_kernels_send_the_same_bytes(kind, shape, monkeypatch):
    pytest.importorskip("triton")
    out, columns, groups, processes = shape
    operands, grid = weight(out, columns, groups), make_grid(*kind)
    buffers, value = sent(operands, grid, processes)
    monkeypatch.setattr(wire, "kernels_serve", lambda x: True)
    import_module("stableqat.ops.wire_kernels")
    by_kernels, made = sent(operands, grid, processes)
    assert all(torch.equal(*pair) for pair in zip(buffers, by_kernels, strict=True))
    assert torch.equal(made, value)


def test_gradients_by_values_give_those_of_the_operands():
    """Also of a process without rows."""
    grid, surrogate, operands = make_grid("integer", 2), Fourier(), weight(4, 6, 2)
    x, scale = operands.x.requires_grad_(), operands.scale.requires_grad_()
    upstream = torch.randn(4, 6, device=DEVICE)
    fake_quantize(x, scale, scale_floor=operands.scale_floor, grid=grid, surrogate=surrogate).backward(
        upstream
    )
    empty = rows_of(operands, 0, 0)
    (found, nothing) = pull_back([upstream, upstream[:0]], [operands, empty], grid=grid, surrogate=surrogate)
    assert torch.equal(found[0], x.grad)
    assert torch.equal(found[1], scale.grad)
    assert [each.shape for each in nothing[:2]] == [(0, 6), (0, 2)]

"""What the tests of the kernels share."""

import os

import pytest
import torch
from kernel_oracle import BF16, DEVICE


@pytest.fixture
def rounding_as_on_a_gpu(monkeypatch):
    """In Triton's interpreter, bfloat16 is the nearest one, not a truncated one, and an fma rounds once.

    Kernels run nowhere else on a CPU, so a run of the tests without it leaves theirs out.
    """
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("neither a GPU nor Triton's interpreter")
    tl = pytest.importorskip("triton.language")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        return interpreter.TensorHandle(
            torch.tensor(source.data).to(BF16).view(torch.uint16).numpy(), tl.bfloat16
        )

    def create_fma(self, x, y, z):
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype("float32"), tl.float32)

    if DEVICE == "cpu":
        monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)

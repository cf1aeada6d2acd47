"""The kernel of cross-entropy gives the loss and the gradient of plain operations."""

import pytest
import torch
from torch.nn import functional as F

from stableqat.ops import IGNORED, fused_cross_entropy


def rows_of(rows, vocab, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, vocab, device="cuda")).to(dtype)
    labels = torch.randint(vocab, (rows,), device="cuda")
    labels[::7] = IGNORED
    return logits, labels


def test_no_kernel_serves_a_cpu():
    logits = torch.randn(2, 8)
    before = logits.clone()
    assert fused_cross_entropy(logits, torch.tensor([1, 2])) is None
    assert torch.equal(logits, before)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "vocab"), [(2048, 49_152), (33, 1000), (5, 128_256), (16, 96)])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_loss_and_gradient(rows, vocab, dtype, precision):
    logits, labels = rows_of(rows, vocab, dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="none")
    expected.sum().backward()
    losses, gradient = fused_cross_entropy(logits, labels)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=precision, atol=1e-6)
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.gpu
def test_what_is_wrong_shows():
    logits, labels = rows_of(4, 64, torch.float32)
    labels[:] = torch.tensor([3, 64, -1, 5])
    logits[3, 7] = float("inf")
    losses, _ = fused_cross_entropy(logits, labels)
    assert losses.isfinite().tolist() == [True, False, False, False]


@pytest.mark.gpu
def test_the_same_call_gives_the_same_bits():
    logits, labels = rows_of(512, 5000, torch.bfloat16)
    one, other = (fused_cross_entropy(logits.clone(), labels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

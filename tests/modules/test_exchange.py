"""Gradients averaged over processes by hooks, as DDP would by buckets."""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from stableqat.modules import exchange
from stableqat.modules.exchange import GradientExchange


@pytest.fixture
def events(monkeypatch):
    """What is exchanged with a process without gradients, and when it is waited for."""
    seen = []

    def all_reduce(tensor, op, async_op=False):
        assert tensor.is_contiguous()
        assert op == (distributed.ReduceOp.AVG if async_op else distributed.ReduceOp.MIN)
        tensor.mul_(0.5 if async_op else 1.0)
        seen.append(tuple(tensor.shape))
        return SimpleNamespace(wait=lambda: seen.append("waited"))

    monkeypatch.setattr(exchange.distributed, "all_reduce", all_reduce)
    return seen


class Model(nn.Module):
    """With one row the gradient of `position` is that of the sum, of which the weight's is computed, too."""

    def __init__(self):
        super().__init__()
        self.linear, self.position = nn.Linear(3, 2, bias=False), nn.Parameter(torch.zeros(1, 2))
        self.head = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return ((self.position + self.linear(x)) @ self.head.T).square().sum()


@pytest.mark.parametrize("overlapping", [True, False])
def test_every_gradient_is_averaged_once_and_no_other_value(overlapping, events):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(1, 3)
    parameters = list(model.parameters())
    alone = torch.autograd.grad(model(x), parameters)
    wrapped = SimpleNamespace(require_backward_grad_sync=True)
    exchanging = GradientExchange(wrapped, parameters)
    exchanging.start()
    assert not wrapped.require_backward_grad_sync
    if overlapping:
        with exchanging.overlapping():
            averaged = torch.autograd.grad(model(x), parameters)
        assert events[-3:] == ["waited"] * 3
        assert "waited" not in events[:3]
    else:
        model(x).backward()
        averaged = [parameter.grad for parameter in parameters]
        assert events[1::2] == ["waited"] * 3
    for ours, theirs in zip(averaged, alone, strict=True):
        torch.testing.assert_close(ours, 0.5 * theirs, rtol=0, atol=0)
    exchanging.stop()
    assert wrapped.require_backward_grad_sync
    assert all(map(torch.equal, torch.autograd.grad(model(x), parameters), alone))


def test_processes_do_what_all_of_them_can(events):
    exchanging = GradientExchange(SimpleNamespace(), [nn.Parameter(torch.zeros(1))])
    assert exchanging.agree(True)
    assert not exchanging.agree(False)

"""What this package's DDP and FSDP2 do otherwise than Lightning's."""

import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn

from stableqat.modules.parallel import DDPStrategy, FSDP2Strategy


@pytest.fixture
def group(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("operation", ["mean", "avg", "sum", "SUM", "max", None, dist.ReduceOp.MIN])
def test_any_reduction_without_a_barrier(operation, group, monkeypatch):
    monkeypatch.setattr(dist, "barrier", lambda *args, **options: pytest.fail("the host would stop here"))
    asked = []
    real = dist.all_reduce
    monkeypatch.setattr(
        dist, "all_reduce", lambda tensor, op, group: asked.append(op) or real(tensor, op, group)
    )
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)  # as if another had added nothing
    for values in ([3.0, -5.0], [4, -6]):
        tensor = torch.tensor(values)
        reduced = DDPStrategy().reduce(tensor, reduce_op=operation)
        assert reduced is tensor
        share = 2 if operation in ("mean", "avg") else 1
        assert reduced.tolist() == [value / share for value in values]
    named = {"max": dist.ReduceOp.MAX, dist.ReduceOp.MIN: dist.ReduceOp.MIN}
    assert asked == [named.get(operation, dist.ReduceOp.SUM)] * 2
    assert FSDP2Strategy().reduce("no tensor", reduce_op=operation) == "no tensor"


class Buffered(nn.Linear):
    def __init__(self, persistent: bool) -> None:
        super().__init__(2, 2)
        self.register_buffer("table", torch.zeros(2), persistent=persistent)


@pytest.mark.parametrize("own", [{}, {"broadcast_buffers": True}])
@pytest.mark.parametrize("model", [Buffered(False), Buffered(True), nn.BatchNorm1d(2)])
def test_constants_are_not_sent_before_each_step(model, own, group, monkeypatch):
    monkeypatch.setattr(DDPStrategy, "determine_ddp_device_ids", lambda self: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if own else "error", FutureWarning)
        made = DDPStrategy(**own)._setup_model(model)
    sent = getattr(made, "forward_sync_buffers", made.broadcast_buffers)
    assert sent == (bool(own) or "table" in model.state_dict() or isinstance(model, nn.BatchNorm1d))


@pytest.mark.parametrize(("on_cpu", "device"), [(False, "meta"), (True, "cpu")])
def test_fsdp2_builds_on_its_device_or_on_the_cpu(on_cpu, device, monkeypatch):
    monkeypatch.setattr(FSDP2Strategy, "root_device", torch.device("meta"))
    with FSDP2Strategy(build_on_cpu=on_cpu).tensor_init_context():
        assert nn.Linear(2, 2).weight.device.type == device

"""Which models gather codes, and what a layer has while FSDP2 gathers them; on one process."""

import copy
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch import nn

import tiny
from stableqat.errors import UserError
from stableqat.layers.gathered import gathered_weights, pull_back, why_not_gathered
from stableqat.layers.linear import QuantLinear, quantized_layers
from stableqat.modules.parallel import FSDP2Strategy, shard
from stableqat.quantizers import STE, StableQAT


class Own(STE):
    """A method with a forward of its own."""

    def forward(self, weight):
        return super().forward(weight) * 2


def layer(make=STE, **options) -> QuantLinear:
    linear = nn.Linear(8, 6)
    return QuantLinear.from_linear(linear, make(linear.weight, bits=2, **options))


def frozen(**of):
    made = layer()
    for parameter in (made.weight, *made.weight_quantizer.parameters())[slice(of.get("all", 1))]:
        parameter.requires_grad_(False)
    return made


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (layer(), None),
        (layer(group_size=4), None),
        (frozen(all=None), None),
        (layer(per_channel=False), "layer 0 has one scale for the whole tensor, not one per row or group"),
        (layer(Own), "Own in layer 0 computes its values in a way of its own"),
        (frozen(), "layer 0 trains its quantizer but not its weight"),
        (layer().double(), "the weight of layer 0 is float64"),
    ],
)
def test_what_cannot_be_gathered(model, reason):
    assert why_not_gathered(nn.Sequential(model)) == reason


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


def test_one_line_says_why(mesh):
    with pytest.raises(UserError) as refused:
        shard(nn.Sequential(layer(per_channel=False)), [], mesh, torch.float32)
    assert str(refused.value) == (
        "trainer.strategy.gather: layer 0 has one scale for the whole tensor, not one per row or group, so "
        "its codes cannot be gathered; take weights"
    )
    with pytest.raises(UserError, match=r"^trainer\.strategy\.gather: "):
        FSDP2Strategy(gather="scales")


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_plain_model(compiled, mesh):
    torch.manual_seed(0)
    plain = nn.Sequential(layer(StableQAT), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(5, 8)
    net = copy.deepcopy(plain)
    shard(net, [], mesh, torch.float32)
    if compiled:
        torch.compiler.reset()
        vars(net)["forward"] = torch.compile(net.forward, backend="aot_eager", fullgraph=True)
    for model in (plain, net):
        model(x).square().sum().backward()
    pull_back(gathered_weights(net))
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad.full_tensor() for name, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_gathered_as_codes(assign, mesh):
    module = tiny.configured("llama", quantizer=partial(StableQAT, bits=2))
    model, ids = module.model, tiny.tokens(3)[None]
    shard(model, module.blocks(model), mesh, torch.float32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = model(input_ids=ids).logits.detach()
    model.reshard()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(model(input_ids=ids).logits, first)
    model.reshard()
    model.load_state_dict(state, assign=assign)
    assert torch.equal(model(input_ids=ids).logits, first)
    assert all(each.known_value() is None for each in quantized_layers(model).values())  # sharded again

"""Which linear layers can be quantized: plain ones, whose weight is a parameter and not computed."""

import logging

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

logger = logging.getLogger(__name__)


def computed_from(linear: nn.Linear) -> str | None:
    """What a weight is computed from, in words; None if it is a parameter itself."""
    if "weight" in linear._parameters:
        return None
    lists = getattr(linear, "parametrizations", {})
    if "weight" in lists:
        return f"a parametrization ({', '.join(type(each).__name__ for each in lists['weight'])})"
    found = [name for name in linear._parameters if name.startswith("weight_")]
    return " and ".join(found) or "other tensors"


def is_plain(linear: nn.Linear) -> bool:
    """Whether a layer computes what `nn.Linear` does; a subclass with its own forward is tried out."""
    kind = type(linear)
    if "forward" in vars(linear):
        return False
    if kind is nn.Linear:
        return True
    alone = {*linear._parameters} <= {"weight", "bias"} and not (linear._buffers or linear._modules)
    if not alone or kind is NonDynamicallyQuantizableLinear or kind.__call__ is not nn.Linear.__call__:
        return False  # torch's attention reads the weight of a NonDynamicallyQuantizableLinear itself
    if kind.forward is nn.Linear.forward:
        return True
    tiny = kind.__new__(kind)
    vars(tiny).update(vars(linear), in_features=3, out_features=2)
    weight, bias = torch.tensor([[0.3, -1.7, 0.9], [2.1, 0.4, -0.6]]), torch.tensor([0.7, -1.1])
    vars(tiny)["_parameters"] = {"weight": weight, "bias": None if linear.bias is None else bias}
    rows = torch.linspace(-2, 2, 24).sin().reshape(2, 4, 3)
    expected = F.linear(rows, weight, tiny.bias)
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            for training in (True, False):
                tiny.training = training
                for x, y in ((rows, expected), (rows[0], expected[0])):
                    torch.testing.assert_close(tiny.forward(x), y, rtol=1e-6, atol=1e-6)
    except Exception:  # it wants something that a plain layer does not have
        return False
    return True

"""FSDP2 gathers codes: each process quantizes its own rows, and codes with scales travel, not float32.

`fully_shard` asks a shard what to gather and what to make of it, by two functions that it looks for on the
shard. Here they are attributes of the plain shard, so optimizers and checkpoints find ordinary tensors. The
unsharded parameter is the fake-quantized value in the compute type, and the gradient that FSDP2 reduces to
the shards, and accumulates there, is the one by the value. `pull_back` takes it through the surrogate, once
per optimizer step; the gradients of scale and surrogate parameter follow from the same one. Quantizers'
parameters are sharded by row for good, because a buffer brings all of them that another process needs.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from stableqat import ops
from stableqat.layers.experts import quantized_experts
from stableqat.layers.linear import QuantLinear, quantized_layers
from stableqat.quantizers.shard import local


class GatheredWeight:
    """A sharded weight of which FSDP2 gathers codes and scales.

    Attributes:
        parameter: The latent weight, of which this process has its rows.

    Args:
        layer: Its layer, already sharded.
        processes: Among how many processes the rows are divided.
        dtype: Type of the values.
    """

    def __init__(self, layer: QuantLinear, processes: int, dtype: torch.dtype) -> None:
        self.layer, self.quantizer, self.dtype = layer, layer.weight_quantizer, dtype
        self.parameter = layer.weight
        self._value: Tensor | None = None
        out, columns = self.parameter.shape
        groups = self.quantizer.scale.shape[1]
        self.wire = ops.Wire(self.quantizer.grid, -(-out // processes), columns, groups)
        layer._gathered = self

    def attach(self) -> None:
        """Let FSDP2 find the two functions on the shard, which loading or moving may have replaced."""
        weight = self.layer._parameters["weight"]
        if isinstance(weight, DTensor):
            self.parameter = weight
        assert isinstance(self.parameter, DTensor)
        shard = vars(self.parameter._local_tensor)  # where FSDP2 looks; `to_local` may give a view of it
        if "fsdp_pre_all_gather" not in shard:
            shard.update(fsdp_pre_all_gather=self._before, fsdp_post_all_gather=self._after)

    def check(self) -> None:
        """Make sure that the layer has its value, and let its gradient have the type that FSDP2 reduces."""
        weight = self.layer._parameters["weight"]
        assert weight is not None
        assert self._value is not None
        assert weight.data_ptr() == self._value.data_ptr(), "FSDP2 did not gather codes"
        if weight.dtype != self.parameter.dtype and weight.grad_dtype != self.parameter.dtype:
            weight.grad_dtype = self.parameter.dtype

    def operands(self) -> ops.Operands:
        """This process's rows of the weight and of its quantizer's parameters."""
        own = self.quantizer.operands(self.parameter)
        return ops.Operands(*[None if each is None else local(each) for each in own])  # type: ignore[arg-type]

    def _before(self, mesh: Any) -> tuple[tuple[Tensor], None]:
        """What FSDP2 gathers, here of fewer bytes than the shard has elements."""
        return (ops.encode(self.operands(), self.wire),), None

    def _after(
        self, gathered: tuple[Tensor], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """The unsharded parameter, whose memory FSDP2 frees and allocates again for a later gather."""
        (buffers,) = gathered
        if out is not None:
            with torch.autograd._unsafe_preserve_version_counter(out):  # autograd has saved it
                ops.decode(buffers, self.wire, out.detach())
            return None
        self._value = value = torch.empty(self.parameter.shape, dtype=self.dtype, device=buffers.device)
        ops.decode(buffers, self.wire, value)
        return value, (value,)


def why_not_gathered(model: nn.Module) -> str | None:
    """Say what in a model keeps its codes from being gathered; None if nothing does."""
    for name in quantized_experts(model):
        return f"the fused experts {name} are not linear layers"
    for name, layer in quantized_layers(model).items():
        quantizer, learned = layer.weight_quantizer, layer.weight_quantizer.surrogate_param()
        method = type(quantizer).__name__
        if not quantizer.fuses or not (learned is None or learned.is_leaf):
            return f"{method} in layer {name} computes its values in a way of its own"
        if quantizer.scale.shape[0] != layer.out_features:
            return f"layer {name} has one scale for the whole tensor, not one per row or group"
        if layer.weight.dtype == torch.float64:
            return f"the weight of layer {name} is float64"
        if not layer.weight.requires_grad and any(p.requires_grad for p in quantizer.parameters()):
            return f"layer {name} trains its quantizer but not its weight"
    return None


def shard_quantizers(layers: Iterable[QuantLinear], mesh: Any) -> set[nn.Parameter]:
    """Shard the parameters of weights' quantizers by row.

    Args:
        layers: The layers.
        mesh: The processes, in one dimension.

    Returns:
        The sharded parameters, which FSDP2 has to leave alone.
    """
    made = set()
    for layer in layers:
        if layer._group is not None:
            layer._group.dissolve()
        for module in layer.weight_quantizer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                kept = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
                module.register_parameter(name, kept)
                made.add(kept)
    return made


def gather_codes(units: Sequence[nn.Module], processes: int, dtype: torch.dtype) -> None:
    """Let FSDP2 gather the codes of all quantized layers.

    Args:
        units: The modules that `fully_shard` was called on, the root last.
        processes: Among how many processes rows are divided.
        dtype: Type of the values.
    """
    left = {layer: GatheredWeight(layer, processes, dtype) for layer in quantized_layers(units[-1]).values()}
    every = list(left.values())

    def attach(*_: Any) -> None:
        for each in every:
            each.attach()

    attach()
    units[-1].register_forward_pre_hook(attach, prepend=True)  # before FSDP2's own, which gathers
    for unit in units:
        own = [left.pop(layer) for layer in quantized_layers(unit).values() if layer in left]

        def check(*_: Any, own: list[GatheredWeight] = own) -> None:
            for each in own:
                each.check()

        unit.register_forward_pre_hook(check)


def gathered_weights(model: nn.Module) -> list[GatheredWeight]:
    """The weights of a model of which codes are gathered."""
    layers = quantized_layers(model).values()
    return [layer._gathered for layer in layers if layer._gathered is not None]


@torch.no_grad()
def pull_back(weights: Iterable[GatheredWeight]) -> None:
    """Turn gradients by values into gradients by latent weights, scales and surrogate parameters.

    Args:
        weights: Those without a gradient are left alone, as their step is dropped.
    """
    alike: dict[Hashable, list[GatheredWeight]] = {}
    for each in weights:
        if each.parameter.grad is not None:
            alike.setdefault(each.quantizer.kind, []).append(each)
    for found in alike.values():
        for first in range(0, len(found), ops.TOGETHER):
            _pull_back(found[first : first + ops.TOGETHER])


def _pull_back(weights: Sequence[GatheredWeight]) -> None:
    first = weights[0].quantizer
    operands = [each.operands() for each in weights]
    by_value = [local(each.parameter.grad) for each in weights]  # type: ignore[arg-type]
    found = ops.pull_back(by_value, operands, grid=first.grid, surrogate=first.surrogate)
    for each, gradient, (by_weight, by_scale, by_param) in zip(weights, by_value, found, strict=True):
        assert by_weight is not None
        gradient.copy_(by_weight)
        _add_gradient(each.quantizer.scale, by_scale)
        _add_gradient(each.quantizer.surrogate_param(), by_param)


def _add_gradient(parameter: Tensor | None, gradient: Tensor | None) -> None:
    if parameter is None or gradient is None or not parameter.requires_grad:
        return
    if parameter.grad is not None:
        local(parameter.grad).add_(gradient)
        return
    assert isinstance(parameter, DTensor)
    parameter.grad = DTensor.from_local(
        gradient,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

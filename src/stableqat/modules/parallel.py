"""What lets a model train on several GPUs and in less memory: DDP, FSDP2, activation checkpointing.

Lightning's FSDP2 makes the GPUs of a node a tensor-parallel group. Here all processes are one
data-parallel group, and `QATModule.configure_model` shards the model block by block.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch import strategies
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from stableqat.checkpoints.names import REST, is_sharded
from stableqat.checkpoints.sharded import load_shards
from stableqat.errors import UserError, check_known
from stableqat.layers.gathered import (
    GatheredWeight,
    gather_codes,
    gathered_weights,
    pull_back,
    shard_quantizers,
    why_not_gathered,
)
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers.oscillation import Freezing


class _Reducing:
    """Reductions as one collective; Lightning's own stop the host at a barrier before each."""

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over all processes in place; return anything else as it is.

        Args:
            tensor: The tensor.
            group: Group of processes; None takes all.
            reduce_op: mean, avg, sum, min, max, product or a `ReduceOp` of torch; None sums.
        """
        if not isinstance(tensor, torch.Tensor):
            return tensor
        name = reduce_op.lower() if isinstance(reduce_op, str) else reduce_op
        mean = name in ("mean", "avg")  # gloo has no mean
        if name is None or mean:
            operation = dist.ReduceOp.SUM
        else:
            operation = getattr(dist.ReduceOp, name.upper()) if isinstance(name, str) else name
        dist.all_reduce(tensor, operation, group=group)
        return tensor.copy_(tensor / dist.get_world_size(group)) if mean else tensor


class DDPStrategy(_Reducing, strategies.DDPStrategy):
    """Distributed data parallelism, `--trainer.strategy ddp`; see Lightning's class of this name.

    If no buffer is part of the state dict, all are constants, and none is sent before each step.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # the first is deprecated in releases of torch that have the second
        names = {"broadcast_buffers", "forward_sync_buffers"}
        name = max(names & signature(DistributedDataParallel).parameters.keys())
        if not names & self._ddp_kwargs.keys() and not _saved_buffers(model):
            self._ddp_kwargs[name] = False
        return super()._setup_model(model)


class FSDP2Strategy(_Reducing, strategies.ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2), `--trainer.strategy fsdp2`.

    Args:
        save_distributed_checkpoint: Each rank writes its shard into a folder; False gathers one file.
        process_group_backend: nccl or gloo; None chooses by the device.
        build_on_cpu: Build the model on the CPU. By default each process builds the whole float32 model on
            its device and keeps its shard: faster by minutes at a billion weights, with the random weights of
            a single GPU; but the model must fit.
        gather: What processes send one another of quantized layers: weights in float32, or codes with their
            scales, of a sixteenth of the bytes at 2 bits. Other parameters are gathered in float32.

    Raises:
        UserError: If `gather` is something else.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        build_on_cpu: bool = False,
        gather: Literal["weights", "codes"] = "weights",
    ) -> None:
        check_known("trainer.strategy.gather", gather, ("weights", "codes"))
        self.gather = gather
        self._gathered: list[GatheredWeight] = []
        self._build_on_cpu = build_on_cpu
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Set the group's size, which is known once the trainer has chosen its devices."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Note the weights whose codes are gathered."""
        super().setup(trainer)
        assert self.model is not None
        self._gathered = gathered_weights(self.model)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Before anybody looks at the step's gradients, turn those by values into those of the parameters."""

        def pulled_back() -> Any:
            loss = closure()
            pull_back(self._gathered)
            return loss

        return super().optimizer_step(optimizer, pulled_back, model, **kwargs)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build the model on the process's device, as other strategies do, or on the CPU."""
        device = nullcontext() if self._build_on_cpu else self.root_device
        with device, super().tensor_init_context(empty_init):
            yield

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """States by parameter name, complete on the first process unless checkpoints are sharded."""
        assert self.model is not None
        whole = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
        return get_optimizer_state_dict(self.model, optimizer, options=options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Resume from one file or from the shards of any number of processes, without pickle."""
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if is_sharded(path):
            load_shards(path, self.model, self.optimizers)
            return torch.load(path / REST, map_location="cpu", weights_only=True)
        optimizers = self.optimizers
        if self._keeps_nothing(path):  # Lightning asks for the first of its states
            self.optimizers = []
        try:
            content = super().load_checkpoint(path, weights_only)
        finally:
            unread, self.optimizers = optimizers[len(self.optimizers) :], optimizers
        for optimizer, state in zip(unread, content.get("optimizer_states", ()), strict=False):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({key: value for key, value in saved.items() if key != "params"})
        return content

    def _keeps_nothing(self, path: Path) -> bool:
        """Whether the optimizers of a checkpoint have no states, as plain SGD's."""
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        return not any(state["state"] for state in content.get("optimizer_states", ()))


def _saved_buffers(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_buffers()} & model.state_dict().keys()


def register_strategies() -> None:
    """Register this module's strategies as `ddp` and `fsdp2` of `--trainer.strategy`, and for `auto`."""
    strategies.StrategyRegistry.register(
        "ddp",
        DDPStrategy,
        "Distributed data parallelism",
        override=True,
        start_method="popen",
        gradient_as_bucket_view=True,  # no second copy of the gradients
        bucket_cap_mb=100,
    )
    strategies.StrategyRegistry.register(
        "fsdp2", FSDP2Strategy, "Fully sharded data parallelism over all processes", override=True
    )


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Let each block save its input only, and compute itself again in the backward.

    The hooks around a forward do not run again: FSDP2 has gathered the block by then.
    """
    for block in blocks:
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: Any, codes: torch.dtype | None = None) -> None:
    """Shard a model over all processes, block by block.

    Args:
        model: The model.
        blocks: Its repeated blocks, each gathered as a whole.
        mesh: The strategy's processes.
        codes: Gather codes in place of quantized weights, and compute with values of this type.

    Raises:
        UserError: If the mesh asks for tensor parallelism, or codes cannot be gathered.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            "trainer.strategy: tensor parallelism is not supported; take --trainer.strategy fsdp2"
        )
    processes, units = mesh["data_parallel"], [*blocks, model]
    options: dict[str, Any] = {"mesh": processes}
    if codes is not None:
        if reason := why_not_gathered(model):
            raise UserError(
                f"trainer.strategy.gather: {reason}, so its codes cannot be gathered; take weights"
            )
        options["ignored_params"] = shard_quantizers(quantized_layers(model).values(), processes)
    else:
        for module in model.modules():
            if isinstance(module, Freezing):  # apart, and so never gathered: no forward reads it
                fully_shard(module, mesh=processes)
    for unit in units:
        fully_shard(unit, **options)
    if codes is not None:
        gather_codes(units, processes.size(), codes)


def states_by_name(module: nn.Module, optimizers: Iterable[Optimizer], states: list[dict[str, Any]]) -> None:
    """Put optimizer states under parameter names, in place.

    PyTorch numbers parameters as the optimizer has them, FSDP2 as the model does; by name, any number
    of processes resumes what another number saved.

    Args:
        module: Whose parameters are optimized.
        optimizers: Its optimizers.
        states: Their state dicts.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        if 0 in state.get("state", ()):
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            groups = [
                {**group, "params": [order[n] for n in group["params"]]} for group in state["param_groups"]
            ]
            states[number] = {
                "state": {order[n]: v for n, v in state["state"].items()},
                "param_groups": groups,
            }

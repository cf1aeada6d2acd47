"""FSDP2 over every process: Lightning's `ModelParallelStrategy` with the sizes a user expects.

Lightning's own defaults make the GPUs of a node a tensor-parallel group. Here all processes
are one data-parallel group; `QATModule.configure_model` shards the model block by block.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim import Optimizer

from stableqat.modules.sharded import REST, is_sharded, load_shards


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2), `--trainer.strategy fsdp2`.

    Args:
        save_distributed_checkpoint: Each rank writes its shard into a folder; False gathers one file.
        process_group_backend: nccl or gloo; None chooses by the device.
    """

    def __init__(
        self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Set the group's size, known only once the trainer has chosen its devices."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State by parameter name, whole on the first process unless checkpoints are sharded."""
        assert self.model is not None
        whole = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
        return get_optimizer_state_dict(self.model, optimizer, options=options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Resume from one file, or from the shards of any number of processes, without unpickling either."""
        path = Path(self.broadcast(checkpoint_path))
        if not is_sharded(path):
            return super().load_checkpoint(path, weights_only)
        assert self.model is not None
        load_shards(path, self.model, self.optimizers)
        return torch.load(path / REST, map_location="cpu", weights_only=True)

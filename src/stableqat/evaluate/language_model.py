"""A model in memory as lm-evaluation-harness wants it, over any number of processes.

The harness takes a live model for a single process; what it needs of others are three exchanges.
"""

import copy
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import distributed as dist

from stableqat.evaluate.processes import Share


class LiveLM(HFLM):
    """The harness's transformers model around one that is there already.

    Args:
        model: Causal language model, in evaluation mode.
        tokenizer: Its tokenizer; left as it is.
        batch_size: Requests a forward.
        share: This process's share of the requests.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, share: Share) -> None:
        # the harness opens an autocast region of its own; it shall be the caller's
        kind = model.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it is given a token to pad with
            batch_size=batch_size,
            mixed_precision_dtype=dtype,
            softmax_dtype=torch.float32,
        )
        self._rank, self._world_size = share.rank, share.count

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """One entry a process, on every process."""
        if self.world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world_size > 1:
            dist.barrier()

"""What a process has of a tensor that may be sharded."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded parameter; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

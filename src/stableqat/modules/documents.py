"""Whether rows of tokens hold several documents is known from the batch, not found in its values.

transformers looks for jumps in the positions and reads on the host whether there is one: every forward then
waits for the GPU, and a CUDA graph, which cannot wait, gets a whole mask in place of causal attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def documents_of(positions: Tensor | None) -> Iterator[None]:
    """Within, models of transformers take rows for what they are told.

    Args:
        positions: `(batch, tokens)`; a document begins where they restart. None says that rows hold one
            document each.
    """
    from transformers import masking_utils

    def indices(position_ids: Tensor) -> Tensor | None:
        if positions is None:
            return None
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    # a graph that is captured gets the mask that any forward gets: the look at values is all that differs
    known = {"find_packed_sequence_indices": indices, "is_tracing": lambda tensor=None: False}
    found = {name: getattr(masking_utils, name) for name in known}
    vars(masking_utils).update(known)
    try:
        yield
    finally:
        vars(masking_utils).update(found)

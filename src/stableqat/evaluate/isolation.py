"""Evaluates in the middle of something else without leaving a trace.

The harness seeds every generator and leaves the model in evaluation mode; a training that continues
afterwards must not notice.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stableqat.layers.hold import hold_weights, release_weights


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and compute quantized weights once; restore modes and generators at the end.

    Args:
        model: The model; enter inside the autocast region that its forward passes run in.
    """
    modes = {module: module.training for module in model.modules()}
    # Lightning's isolate_rng does not restore them after an exception
    states = _collect_rng_states(include_cuda=torch.cuda.is_initialized())
    model.eval()
    release_weights(model)
    hold_weights(model)
    try:
        yield
    finally:
        release_weights(model)
        for module, training in modes.items():
            module.training = training
        if isinstance(model, FSDPModule):
            model.reshard()
        _set_rng_states(states)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what libraries write to stderr, progress bars above all, unless it is a terminal."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(StringIO()):
        yield

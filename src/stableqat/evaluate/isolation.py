"""Evaluate in the middle of something else without leaving a trace.

The harness seeds every generator and leaves the model in evaluation mode; a training that continues
afterwards must not be able to tell.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stableqat.layers.hold import hold_weights, release_weights


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, quantized weights computed once; outside modes and generators as they were.

    Args:
        model: Enter in the autocast region that its forwards run in.
    """
    modes = {module: module.training for module in model.modules()}
    # Lightning's isolate_rng would not put them back after an exception
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
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
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what libraries write to stderr, progress bars above all, unless it is a terminal."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(StringIO()):
        yield

"""Callbacks: divergence guard, quantizer monitor, gradient mismatch, checkpoints, the record of a run."""

from stableqat.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from stableqat.callbacks.divergence import DivergenceGuard
from stableqat.callbacks.mismatch import GradientMismatch
from stableqat.callbacks.monitor import QuantizerMonitor
from stableqat.callbacks.record import RunRecord

__all__ = [
    "BestCheckpoint",
    "DivergenceGuard",
    "GradientMismatch",
    "LastCheckpoint",
    "QuantizerMonitor",
    "RunRecord",
]

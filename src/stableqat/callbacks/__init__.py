"""Callbacks: divergence guard, quantizer monitor, checkpoints, the record of a run."""

from stableqat.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from stableqat.callbacks.divergence import DivergenceGuard
from stableqat.callbacks.monitor import QuantizerMonitor
from stableqat.callbacks.record import RunRecord

__all__ = ["BestCheckpoint", "DivergenceGuard", "LastCheckpoint", "QuantizerMonitor", "RunRecord"]

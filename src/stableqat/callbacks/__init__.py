"""Callbacks: what a run guards, measures, records and saves while it trains."""

from stableqat.callbacks.baseline import Baseline
from stableqat.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from stableqat.callbacks.divergence import DivergenceGuard
from stableqat.callbacks.ema import EMA
from stableqat.callbacks.evaluate import Evaluate
from stableqat.callbacks.hold import HoldWeights
from stableqat.callbacks.interruption import Interruption
from stableqat.callbacks.mismatch import GradientMismatch
from stableqat.callbacks.monitor import QuantizerMonitor
from stableqat.callbacks.prepare import PrepareQAT
from stableqat.callbacks.record import RunRecord
from stableqat.callbacks.throughput import Throughput
from stableqat.callbacks.trajectory import Trajectory

__all__ = [
    "EMA",
    "Baseline",
    "BestCheckpoint",
    "DivergenceGuard",
    "Evaluate",
    "GradientMismatch",
    "HoldWeights",
    "Interruption",
    "LastCheckpoint",
    "PrepareQAT",
    "QuantizerMonitor",
    "RunRecord",
    "Throughput",
    "Trajectory",
]

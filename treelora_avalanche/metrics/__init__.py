"""Metrics of continual learning as Avalanche metric plugins, and the arithmetic behind them."""

from .accuracy_matrix import (
    AccuracyMatrix,
    BackwardTransfer,
    OverallPerformance,
    backward_transfer,
    continual_metrics,
    forgetting,
    overall_performance,
)
from .training import EpochAccuracy, EpochLoss

__all__ = [
    "AccuracyMatrix",
    "BackwardTransfer",
    "EpochAccuracy",
    "EpochLoss",
    "OverallPerformance",
    "backward_transfer",
    "continual_metrics",
    "forgetting",
    "overall_performance",
]

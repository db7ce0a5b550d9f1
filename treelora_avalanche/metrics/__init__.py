"""Metrics of continual learning as Avalanche metric plugins, and the arithmetic behind them."""

from .accuracy_matrix import (
    AccuracyMatrix,
    BackwardTransfer,
    OverallPerformance,
    continual_metrics,
)
from .generation import (
    GenerationBackwardTransfer,
    GenerationOverallPerformance,
    GenerationScore,
    GreedyGeneration,
    TextGenerator,
    find_text_generator,
    generation_metrics,
)
from .score_matrix import (
    ScoreMatrix,
    backward_transfer,
    forgetting,
    overall_performance,
)
from .text_scores import accuracy, edit_similarity, mean_score, rouge_l, sari
from .training import EpochAccuracy, EpochLoss

__all__ = [
    "AccuracyMatrix",
    "BackwardTransfer",
    "EpochAccuracy",
    "EpochLoss",
    "GenerationBackwardTransfer",
    "GenerationOverallPerformance",
    "GenerationScore",
    "GreedyGeneration",
    "OverallPerformance",
    "ScoreMatrix",
    "TextGenerator",
    "accuracy",
    "backward_transfer",
    "continual_metrics",
    "edit_similarity",
    "find_text_generator",
    "forgetting",
    "generation_metrics",
    "mean_score",
    "overall_performance",
    "rouge_l",
    "sari",
]

"""Metrics of continual learning as Avalanche metric plugins, and the arithmetic behind them."""

from treelora_avalanche.metrics.accuracy_matrix import (
    AccuracyMatrix,
    BackwardTransfer,
    OverallPerformance,
    continual_metrics,
)
from treelora_avalanche.metrics.generation import (
    GenerationBackwardTransfer,
    GenerationOverallPerformance,
    GenerationScore,
    GreedyGeneration,
    TextGenerator,
    find_text_generator,
    generation_metrics,
)
from treelora_avalanche.metrics.score_matrix import (
    ScoreMatrix,
    backward_transfer,
    forgetting,
    overall_performance,
)
from treelora_avalanche.metrics.text_scores import (
    accuracy,
    edit_similarity,
    mean_score,
    rouge_l,
    sari,
)
from treelora_avalanche.metrics.training import EpochAccuracy, EpochLoss

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

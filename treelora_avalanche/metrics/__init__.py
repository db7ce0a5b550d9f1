"""Metrics of continual learning: Avalanche metric plugins, and their formulas on a plain matrix.

With f_i(w_j) the score on experience i after training on the j-th one, after n experiences:

* Op_n = (1/n) sum_i f_i(w_n), overall performance. **Higher is better.**
* Bwt_n = (1/n) sum_i (f_i(w_i) - f_i(w_n)), backward transfer of the TreeLoRA paper. **Positive is
  forgetting, lower is better**: the opposite sign of Avalanche's ``StreamBWT``.
* forgetting = (1/(n-1)) sum_(i<n) (f_i(w_i) - f_i(w_n)), Avalanche's ``StreamForgetting``.
  **Positive is forgetting, lower is better.**
"""

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

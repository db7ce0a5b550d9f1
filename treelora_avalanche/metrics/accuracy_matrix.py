"""Accuracy matrix of a stream, and the metrics Op_n and Bwt_n of it.

The formulas stand in :mod:`~treelora_avalanche.metrics.score_matrix`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricResult
from torch import Tensor

from treelora_avalanche.experiences import classes_of
from treelora_avalanche.metrics.score_matrix import (
    SIGN,
    NumberOfMatrix,
    ScoreMatrix,
    backward_transfer,
    forgetting,
    overall_performance,
)
from treelora_avalanche.state import check_keys

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate


class AccuracyMatrix(ScoreMatrix):
    """Records f_i(w_j): accuracy on every experience after every experience trained.

    It emits the accuracy of each evaluated experience; :meth:`matrix` returns the matrix, see
    :class:`~treelora_avalanche.metrics.score_matrix.ScoreMatrix` for its rows. Higher is better.
    Counts stay on the device: there is one synchronisation per evaluated experience. Task labels
    are not used.

    Example::

        accuracies = AccuracyMatrix()
        strategy = TreeLoRAStrategy(model, evaluator=EvaluationPlugin(accuracies, loggers=[]))
        for experience in benchmark.train_stream:
            strategy.train(experience)
            strategy.eval(benchmark.test_stream)
        print(accuracies.matrix(), backward_transfer(accuracies.matrix()))
    """

    def __init__(self, within_task: bool = False):
        """
        :param within_task: if True, the prediction is the largest logit among the classes of the
            evaluated experience (task-incremental accuracy); if False, among all classes
            (class-incremental accuracy).
        """
        super().__init__()
        self.within_task = within_task
        self._start_count()

    def _start_count(self) -> None:
        self._correct: Tensor | None = None  # () on the device
        self._total = 0
        self._classes: Tensor | None = None  # (n_classes_in_experience,) on the device

    def reset(self) -> None:
        """Clears all evaluations and the order of training."""
        super().reset()
        self._start_count()

    def state_dict(self) -> dict[str, Any]:
        """Returns the accuracies and the order of training, as plain values with string keys."""
        return {"within_task": self.within_task, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state.

        :param state: as returned by :meth:`state_dict`.
        :raises ValueError: if it lacks keys or has unknown ones, or is of the other kind of
            accuracy; the metric is then unchanged.
        """
        check_keys(state, self.state_dict(), f"the state of {self}")
        if state["within_task"] != self.within_task:
            raise ValueError(
                f"`within_task` should be {state['within_task']} as in the state, but is "
                f"{self.within_task}. List the metrics in the order in which they were saved."
            )
        super().load_state_dict(state)
        self._start_count()

    def before_eval_exp(self, strategy: SupervisedTemplate) -> None:
        self._start_count()
        if self.within_task:
            self._classes = torch.tensor(classes_of(strategy.experience), device=strategy.device)

    def after_eval_iteration(self, strategy: SupervisedTemplate) -> None:
        super().after_eval_iteration(strategy)
        output: Tensor = strategy.mb_output  # (batch, n_outputs)
        if self._classes is None:
            predicted = output.argmax(dim=1)
        else:
            predicted = self._classes[output.index_select(1, self._classes).argmax(dim=1)]
        correct = (predicted == strategy.mb_y).sum()
        self._correct = correct if self._correct is None else self._correct + correct
        self._total += len(output)

    def after_eval_exp(self, strategy: SupervisedTemplate) -> MetricResult:
        if self._correct is None:  # an experience without samples has no accuracy
            return None
        return self.record(strategy, self._correct.item() / self._total)

    def __str__(self) -> str:
        return "AccuracyMatrix" + ("_WithinTask" if self.within_task else "")


class _NumberOfAccuracies(NumberOfMatrix, AccuracyMatrix):
    """A single number computed from the accuracy matrix."""

    _name: str

    def __str__(self) -> str:
        return self._name + ("_WithinTask" if self.within_task else "")


class OverallPerformance(_NumberOfAccuracies):
    """Op_n = (1/n) sum_(i<=n) f_i(w_n), mean accuracy over seen experiences. **Higher is better.**

    The whole test stream may be evaluated: unseen experiences are not counted. Nothing is emitted
    if a seen experience is missing from the evaluation. See :func:`overall_performance`; for the
    argument see :class:`AccuracyMatrix`.

    Example::

        evaluator = EvaluationPlugin(OverallPerformance(), loggers=[InteractiveLogger()])
    """

    _name = "OverallPerformance"

    def _number(self, matrix: Tensor) -> float:
        return overall_performance(matrix)


class BackwardTransfer(_NumberOfAccuracies):
    """Bwt_n = (1/n) sum_(i<=n) (f_i(w_i) - f_i(w_n)) of the TreeLoRA paper.

    **Positive is forgetting, lower is better**: the opposite sign of Avalanche's `StreamBWT`, where
    negative is forgetting. Hence its name in logs, `BackwardTransfer_PositiveIsForgetting`.
    Bwt_n = (n-1)/n StreamForgetting = -(n-1)/n StreamBWT. It needs an evaluation of all seen
    experiences after every experience, and emits nothing if one is missing. See
    :func:`backward_transfer`; for the argument see :class:`AccuracyMatrix`.

    Example::

        evaluator = EvaluationPlugin(BackwardTransfer(), loggers=[InteractiveLogger()])
    """

    _name = "BackwardTransfer" + SIGN

    def _number(self, matrix: Tensor) -> float:
        return backward_transfer(matrix)


def continual_metrics(
    *, class_incremental: bool = True, within_task: bool = True
) -> list[PluginMetric]:
    """Returns the paper's metrics for Avalanche's `EvaluationPlugin`.

    Example::

        evaluator = EvaluationPlugin(continual_metrics(), loggers=[InteractiveLogger()])

    :param class_incremental: whether to include predictions among all classes.
    :param within_task: whether to include predictions among the classes of the evaluated
        experience.
    :return: accuracy matrix, Op_n (higher is better) and Bwt_n (lower is better) of each kind.
    """
    metrics: list[PluginMetric] = []
    for wanted, within in ((class_incremental, False), (within_task, True)):
        if wanted:
            metrics += [
                AccuracyMatrix(within_task=within),
                OverallPerformance(within_task=within),
                BackwardTransfer(within_task=within),
            ]
    return metrics


__all__ = [
    "AccuracyMatrix",
    "BackwardTransfer",
    "OverallPerformance",
    "backward_transfer",
    "continual_metrics",
    "forgetting",
    "overall_performance",
]

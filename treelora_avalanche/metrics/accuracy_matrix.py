"""The matrix of accuracies of a stream, and what is read from it.

See :mod:`~treelora_avalanche.metrics.score_matrix` for the definitions of Op and Bwt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricResult
from torch import Tensor

from treelora_avalanche.metrics.score_matrix import (
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
    """f_i(w_j): accuracy on every experience after every experience trained.

    How rows are kept is said at :class:`~treelora_avalanche.metrics.score_matrix.ScoreMatrix`.
    Counts stay on the device: there is one synchronisation per evaluated experience. Task labels
    are not used. As a metric it emits the accuracy of each evaluated experience; the matrix
    itself is read with :meth:`matrix`.
    """

    def __init__(self, within_task: bool = False):
        """
        :param within_task: if True, the prediction is the best output among the classes of the
            evaluated experience (as if its identity were known); if False, among all outputs
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
        """Forget every evaluation and the order of training."""
        super().reset()
        self._start_count()

    def state_dict(self) -> dict[str, Any]:
        """The accuracies and the order of training, as plain values whose keys are strings."""
        return {"within_task": self.within_task, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it lacks keys or has unknown ones, or is of the other kind of
            accuracy; the metric is then as it was.
        """
        check_keys(state, self.state_dict(), f"the state of {self}")
        if state["within_task"] != self.within_task:
            raise ValueError(
                f"`within_task` is {state['within_task']} in the state, and {self.within_task} "
                "here; list the metrics in the order in which they were saved."
            )
        super().load_state_dict(state)
        self._start_count()

    def before_eval_exp(self, strategy: SupervisedTemplate) -> None:
        self._start_count()
        if self.within_task:
            experience: Any = strategy.experience
            self._classes = torch.tensor(
                sorted(experience.classes_in_this_experience), device=strategy.device
            )

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
    """A single number of the accuracy matrix."""

    _name: str

    def __str__(self) -> str:
        return self._name + ("_WithinTask" if self.within_task else "")


class OverallPerformance(_NumberOfAccuracies):
    """Op_n, the mean accuracy over the experiences seen so far. Higher is better.

    The whole test stream may be evaluated: experiences not trained yet do not count. Nothing is
    emitted when a seen experience is missing from the evaluation. See
    :func:`overall_performance`; for the argument see :class:`AccuracyMatrix`.
    """

    _name = "OverallPerformance"

    def _number(self, matrix: Tensor) -> float:
        return overall_performance(matrix)


class BackwardTransfer(_NumberOfAccuracies):
    """Bwt_n of the paper. **Positive is forgetting**: lower is better.

    It is (n-1)/n times Avalanche's `StreamForgetting`, and -(n-1)/n times its `StreamBWT`. It
    needs an evaluation after every experience, of all experiences seen, and emits nothing
    where one is missing. See :func:`backward_transfer`; for the argument see
    :class:`AccuracyMatrix`.
    """

    _name = "BackwardTransfer"

    def _number(self, matrix: Tensor) -> float:
        return backward_transfer(matrix)


def continual_metrics(
    *, class_incremental: bool = True, within_task: bool = True
) -> list[PluginMetric]:
    """The metrics of the paper, for Avalanche's `EvaluationPlugin`.

    :param class_incremental: predictions among all outputs.
    :param within_task: predictions among the classes of the evaluated experience.
    :return: accuracy matrix, overall performance and backward transfer of each chosen kind.
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

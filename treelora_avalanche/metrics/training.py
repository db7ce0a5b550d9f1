"""Loss and accuracy of a training epoch, read from the device once per epoch.

Avalanche's `loss_metrics(epoch=True)` and `accuracy_metrics(epoch=True)` synchronise at every
minibatch (`Mean.update` calls `float`), which stalls a GPU. These two emit the same values under
the same names, so that every Avalanche logger shows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricResult, MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from torch import Tensor

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate


class EpochLoss(PluginMetric[float]):
    """Mean training loss of an epoch, sum_b n_b loss_b / sum_b n_b, without synchronisation.

    Lower is better. Task labels are not used.

    Example::

        evaluator = EvaluationPlugin(EpochLoss(), loggers=[InteractiveLogger()])
    """

    _name = "Loss_Epoch"

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def _sum_over(self, strategy: SupervisedTemplate) -> Tensor:
        return strategy.loss.detach().sum() * len(strategy.mb_output)

    def reset(self) -> None:
        """Clears the epoch so far."""
        self._sum: Tensor | None = None  # () on the device
        self._total = 0

    def result(self) -> float:
        """Returns the mean since the last reset; NaN before any minibatch."""
        return float("nan") if self._sum is None else self._sum.item() / self._total

    def before_training_epoch(self, strategy: SupervisedTemplate) -> None:
        self.reset()

    def after_training_iteration(self, strategy: SupervisedTemplate) -> None:
        super().after_training_iteration(strategy)
        value = self._sum_over(strategy)
        self._sum = value if self._sum is None else self._sum + value
        self._total += len(strategy.mb_output)

    def after_training_epoch(self, strategy: SupervisedTemplate) -> MetricResult:
        name = get_metric_name(self, strategy)
        return [MetricValue(self, name, self.result(), strategy.clock.train_iterations)]

    def __str__(self) -> str:
        return self._name


class EpochAccuracy(EpochLoss):
    """Training accuracy of an epoch, without synchronisation.

    Higher is better. Task labels are not used.

    Example::

        evaluator = EvaluationPlugin(EpochAccuracy(), loggers=[InteractiveLogger()])
    """

    _name = "Top1_Acc_Epoch"

    def _sum_over(self, strategy: SupervisedTemplate) -> Tensor:
        return (strategy.mb_output.detach().argmax(dim=1) == strategy.mb_y).sum()


__all__ = ["EpochAccuracy", "EpochLoss"]

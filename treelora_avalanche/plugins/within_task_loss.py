"""Loss over the classes of the current task only."""

from __future__ import annotations

import logging
from typing import Any

import torch
from avalanche.evaluation.metric_utils import get_metric_name
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from treelora_avalanche.adapters.classifier import check_classes
from treelora_avalanche.experiences import classes_of

logger = logging.getLogger(__name__)

_TRAINING_ACCURACY = "Top1_Acc_Epoch"


class WithinTaskLoss(nn.Module):
    """Criterion over the logits of the current experience's classes.

    The true class of a sample is always included, also for a sample of another experience (from a
    replay memory). Example::

        criterion = WithinTaskLoss(nn.CrossEntropyLoss())
        criterion.current = torch.tensor([4, 5])
        loss = criterion(logits, targets)

    :param criterion: the criterion of logits ``(batch, n_classes)`` and targets ``(batch,)``.
    """

    def __init__(self, criterion: Any):
        super().__init__()
        self.criterion = criterion
        self.current: Tensor | None = None  # (n_classes_of_the_experience,)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        keep = torch.zeros_like(logits, dtype=torch.bool)
        keep[:, self.current] = True
        keep.scatter_(1, targets[:, None], True)
        return self.criterion(logits.masked_fill(~keep, float("-inf")), targets)


class WithinTaskLossPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Restricts the training loss to the classes of the experience.

    The prompt methods call this masking the logits of other tasks: the loss of a task does not
    lower the logits of other classes. Predictions compare all classes. Works with any strategy, and
    next to another plugin of this kind. Task labels are not used.

    The training accuracy in the log compares all classes too, and may be 0 while the loss falls: a
    warning explains that once. Example::

        strategy = SeqLoRA(model, plugins=[WithinTaskLossPlugin()])
    """

    _explained = False

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Restricts the loss to the classes of the experience."""
        check_classes(strategy.model, strategy.experience)
        if not isinstance(strategy._criterion, WithinTaskLoss):
            strategy._criterion = WithinTaskLoss(strategy._criterion)
        classes = classes_of(strategy.experience)
        strategy._criterion.current = torch.tensor(classes, device=strategy.device)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Explains a training accuracy of 0 in the last epoch, once."""
        name = get_metric_name(_TRAINING_ACCURACY, strategy)
        if not self._explained and strategy.evaluator.get_last_metrics().get(name) == 0:
            self._explained = True
            logger.warning(
                "%s is 0 because it compares all classes, while the loss compares those of the "
                "experience alone. AccuracyMatrix(within_task=True) shows the accuracy among "
                "these.",
                _TRAINING_ACCURACY,
            )

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Checks that the classifier has the classes, also in a strategy that does not check."""
        check_classes(strategy.model, strategy.experience)

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Restores the criterion of the strategy."""
        if isinstance(strategy._criterion, WithinTaskLoss):
            strategy._criterion = strategy._criterion.criterion

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: nothing outlives an experience."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing.

        :param state: what :meth:`state_dict` returned.
        """

"""A loss that compares the classes of the present task alone."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from treelora_avalanche.adapters.classifier import check_classes


class WithinTaskLoss(nn.Module):
    """A criterion that compares only the classes of the current experience.

    A sample of another class (from a replay memory) competes with these by its own output.

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
    """Narrows the loss to the classes of the experience, while it is trained.

    What the prompt methods call masking the logits of other tasks: the head forgets nothing there
    that a later task could make it forget. Predictions compare all classes. Works with any
    strategy, and beside another plugin of this kind. Task labels are not used.
    """

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Narrows the loss to the classes of the experience."""
        check_classes(strategy.model, strategy.experience)
        if not isinstance(strategy._criterion, WithinTaskLoss):
            strategy._criterion = WithinTaskLoss(strategy._criterion)
        classes = sorted(strategy.experience.classes_in_this_experience)
        strategy._criterion.current = torch.tensor(classes, device=strategy.device)

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Checks that the classifier knows the classes, also of a strategy that does not."""
        check_classes(strategy.model, strategy.experience)

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Gives the strategy its own criterion back."""
        if isinstance(strategy._criterion, WithinTaskLoss):
            strategy._criterion = strategy._criterion.criterion

    def state_dict(self) -> dict[str, Any]:
        """Nothing: there is nothing to keep from one experience to the next."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load.

        :param state: what :meth:`state_dict` returned.
        """

"""GEM whose memory loss compares the classes of a sample's own task (Lopez-Paz & Ranzato 2017)."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import GEMPlugin
from torch import Tensor

from treelora_avalanche.experiences import classes_of
from treelora_avalanche.plugins.within_task_loss import WithinTaskLoss


class WithinTaskGEMPlugin(GEMPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Avalanche's :class:`~avalanche.training.plugins.GEMPlugin` with a memory loss per task.

    The loss of task k's memory compares the classes of task k alone, as in the released code.
    Avalanche's compares all: its gradient mostly undoes what later classes did to the logits of
    earlier ones. The loss of the current task still compares all classes, as for the other methods.
    For language models, which have no classes, it is Avalanche's. Task labels are not used.
    Example::

        strategy = SeqLoRA(model, plugins=[WithinTaskGEMPlugin(100, 0.05)])

    :param patterns_per_experience: samples stored per experience.
    :param memory_strength: margin of the projection.
    """

    def __init__(self, patterns_per_experience: int, memory_strength: float):
        super().__init__(patterns_per_experience, memory_strength)
        self.memory_classes: dict[int, Tensor] = {}
        """Classes of every experience in the memory, ``(n_classes,)``."""

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Computes the gradients of the memory."""
        criterion = strategy._criterion
        strategy._criterion = self._within_tasks(criterion)
        try:
            super().before_training_iteration(strategy, **kwargs)
        finally:
            strategy._criterion = criterion

    def _within_tasks(self, criterion: Any) -> Any:
        """The criterion that Avalanche calls for each past experience, in their order."""
        within = WithinTaskLoss(criterion)
        experiences = iter(range(len(self.memory_classes)))

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            classes = self.memory_classes[next(experiences)]
            if not len(classes):  # of tokens
                return criterion(output, targets)
            within.current = classes.to(output.device)
            return within(output, targets)

        return loss

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Stores samples of the experience, and its classes."""
        super().after_training_exp(strategy, **kwargs)
        number = strategy.clock.train_exp_counter
        of_images = self.memory_y[number].ndim == 1  # and not of tokens
        classes = classes_of(strategy.experience) if of_images else []
        self.memory_classes[number] = torch.tensor(classes, dtype=torch.long)

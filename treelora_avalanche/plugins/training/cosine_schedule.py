"""Cosine schedule of the learning rate within every experience."""

from __future__ import annotations

import math
from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.state import check_keys


class CosineSchedulePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Lowers the learning rate within every experience: ``lr (1 + cos(π t / T)) / 2`` at step t.

    T is the number of steps of the experience; the next one starts at the full value again. No
    warm-up. Works with any strategy that uses a torch optimizer. Task labels are not used.
    Example::

        strategy = SeqLoRA(model, plugins=[CosineSchedulePlugin()])
    """

    def __init__(self) -> None:
        super().__init__()
        self._full: list[float] | None = None
        self._step = self._n_steps = 0

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the full learning rates and the number of steps."""
        if self._full is not None:  # the previous experience was interrupted
            self._restore(strategy)
        self._full = [float(group["lr"]) for group in strategy.optimizer.param_groups]
        per_step = getattr(strategy, "accumulation_steps", 1)
        self._n_steps = strategy.train_epochs * -(-len(strategy.dataloader) // per_step)
        self._step = 0

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Sets the learning rates of the step."""
        if self._full is None:
            return
        share = (1 + math.cos(math.pi * min(1.0, self._step / max(1, self._n_steps)))) / 2
        for group, full in zip(strategy.optimizer.param_groups, self._full, strict=True):
            group["lr"] = share * full
        self._step += 1

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Restores the full learning rates."""
        self._restore(strategy)
        self._full = None

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: nothing outlives an experience."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the state is empty; an interrupted experience is abandoned.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it is not empty.
        """
        check_keys(state, (), "the state of CosineSchedulePlugin")
        self._full = None

    def _restore(self, strategy: Any) -> None:
        for group, full in zip(strategy.optimizer.param_groups, self._full or (), strict=True):
            group["lr"] = full

"""A new adapter for every experience, next to the frozen ones of the past."""

from __future__ import annotations

from itertools import chain
from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.adapters import LoRAFactors, PastAdapters
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys, reset_optimizer_state


class PastAdaptersPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Freezes the adapter of an experience when the next one begins, and starts a new one.

    The common part of O-LoRA and InfLoRA. An adapter with B ≠ 0 at the start of an experience
    counts as past, so a trained adapter that the user brings along is frozen too. It is folded only
    then: the adapter that is saved after an experience is that experience's own. The optimizer's
    state of the old adapter is reset. In an online stream the parts of a task share one adapter.
    Example::

        past = PastAdapters(model)
        strategy = Naive(model, plugins=[PastAdaptersPlugin(past)])

    :param past: the past adapters of the strategy's model.
    """

    requires_whole_adapter: str | None = "freezes a whole adapter per experience"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(self, past: PastAdapters):
        super().__init__()
        self.past = past
        self._parts = TaskParts()
        self._continues = False
        """Whether the experience is a further part of a task."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Folds the adapter of the last experience."""
        self._factors = LoRAFactors(strategy.model)
        self._continues = self._parts.continues(strategy.experience)
        if not self._continues and any(b.detach().any() for _, b in self._factors.parameters):
            self.past.fold()
            reset_optimizer_state(strategy.optimizer, chain.from_iterable(self._factors.parameters))

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the task, to recognise its further parts."""
        self._parts.finish(strategy.experience)

    def state_dict(self) -> dict[str, Any]:
        """Returns the past adapters."""
        return {"past": self.past.state_dict(), "task": self._parts.task}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the past adapters into the model.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if they do not fit the model; it is then unchanged.
        """
        check_keys(state, {"past", "task"}, f"the state of {type(self).__name__}")
        self.past.load_state_dict(state["past"])
        self._parts.task = state["task"]

"""Sets the active adapter, after every experience, to the mean of all finished ones."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.experiences import is_part
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys, clone_state


class MergedAdapterPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Predicts with, and starts the next experience from, the mean of all adapters learned so far.

    In TreeLoRA's Figure 2 the inner nodes of the tree are the adapters of groups of tasks; the
    root's is that of all. With θ_i the adapter at the end of experience i, the active adapter after
    experience n is ``(θ_1 + ... + θ_n) / n``. Every θ_i was trained from the mean of its
    predecessors, so the factors themselves can be averaged: none is far from the others. The mean
    is a running one; time and memory do not grow with the experiences. In an online stream the
    parts of a task are one task: a further part continues from the adapter of the part before, and
    replaces it in the mean.

    Works with any strategy whose model carries LoRA. The classifier must fit the mean, not the
    adapter it was trained with: place this plugin before a
    :class:`~treelora_avalanche.plugins.TaskAdaptiveHeadPlugin`, and after a
    :class:`~treelora_avalanche.plugins.TreeBuilderPlugin`, which stores the experience's own
    adapter. Task labels are not used. Example::

        plugins = [TreeBuilderPlugin(tree, bank), MergedAdapterPlugin(), TaskAdaptiveHeadPlugin()]
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_experiences = 0
        """Number of tasks in the mean."""
        self._parts = TaskParts()
        self._mean: Tensor | None = None
        self._own: Tensor | None = None
        """After a part of a task: the mean of the tasks before, and the adapter of the task."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the mean so far, where training starts."""
        if self._own is None or not self._parts.continues(strategy.experience):
            self._mean, self._own = LoRAFactors(strategy.model).stack.clone(), None

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Restores the adapter of the task before the first epoch of a further part.

        In ``before_training_exp`` other plugins still see the adapter of the predictions.
        """
        if self._own is not None and strategy.clock.train_exp_epochs == 0:
            LoRAFactors(strategy.model).stack.copy_(self._own)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the experience to the mean."""
        assert self._mean is not None
        self.n_experiences += self._own is None
        stack = LoRAFactors(strategy.model).stack
        part = is_part(strategy.experience)
        self._own = stack.clone() if part else None
        # Exact in the first experience: the weight of the old mean is 0.
        stack.lerp_(self._mean.to(stack), 1 - 1 / self.n_experiences)
        self._mean = self._mean if part else None
        self._parts.finish(strategy.experience)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of adapters in the mean; the mean itself is the active adapter.

        After a part of a task: the mean of the tasks before and the task's own adapter, too.
        """
        return {
            "n_experiences": self.n_experiences,
            "task": self._parts.task,
            "mean": self._mean,
            "own": self._own,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        """
        keys = {"n_experiences", "task", "mean", "own"}
        check_keys(state, keys, "the state of MergedAdapterPlugin")
        self.n_experiences = state["n_experiences"]
        self._parts.task = state["task"]
        self._mean, self._own = clone_state(state["mean"]), clone_state(state["own"])

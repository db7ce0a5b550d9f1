"""Training of prompts: the loss of their keys, and a new prompt per task."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.models.prompts.pools import TaskPrompts
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys, check_same_settings, reset_optimizer_state


@runtime_checkable
class Keyed(Protocol):
    """A model with keys that are trained towards the queries."""

    key_distance: Tensor | None
    """Distance of the last batch, a scalar with a gradient to the keys."""


class KeyLossPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Adds ``sim_coefficient`` times the distance between queries and their keys to the loss.

    As in L2P (Eq. 5) and DualPrompt. The forward pass of the strategy's model computes the
    distance. Stores nothing. Task labels are not used. Example::

        strategy = Naive(prompted_model, plugins=[KeyLossPlugin(sim_coefficient=0.5)])

    :param sim_coefficient: weight of the distance.
    :raises ValueError: if ``sim_coefficient`` is negative.
    """

    def __init__(self, sim_coefficient: float):
        super().__init__()
        if not sim_coefficient >= 0:
            raise ValueError(
                f"`sim_coefficient` should be at least 0, but is {sim_coefficient}. Use 0 for no "
                "key loss."
            )
        self.sim_coefficient = sim_coefficient

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Finds the module that has the keys.

        :raises ValueError: if there is none.
        """
        keyed = next((m for m in strategy.model.modules() if isinstance(m, Keyed)), None)
        if keyed is None:
            raise ValueError(
                f"`model` should have keyed prompts, but is a {type(strategy.model).__name__}. Use "
                "a model such as L2P's."
            )
        self._keyed = keyed

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the distance of the batch to the loss.

        :raises RuntimeError: if the forward pass has not computed it.
        """
        distance = self._keyed.key_distance
        if distance is None:
            raise RuntimeError(
                "`model` should compute the distance of its keys, but is not in training mode. "
                "Call `model.train()`."
            )
        strategy.loss = strategy.loss + self.sim_coefficient * distance
        self._keyed.key_distance = None  # a copy of the model must not reach into the graph

    def state_dict(self) -> dict[str, Any]:
        """Returns the coefficient, so that a stream is not continued with another."""
        return {"sim_coefficient": float(self.sim_coefficient)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the coefficient is the same; nothing is loaded.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if the coefficient differs.
        """
        check_keys(state, {"sim_coefficient"}, "the state of KeyLossPlugin")
        check_same_settings(state, {"sim_coefficient": self.sim_coefficient})


class TaskPromptsPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Freezes the prompt of a task when the next one begins; the new prompt starts from it.

    The optimizer's state of the old prompt is reset. Stores one prompt, and its key if it has one,
    per task; in an online stream the parts of a task share it. Task labels are not used. Example::

        strategy = Naive(prompted_model, plugins=[TaskPromptsPlugin(prompted_model.prompts)])

    :param prompts: the prompts of the strategy's model.
    """

    def __init__(self, prompts: TaskPrompts):
        super().__init__()
        self.prompts = prompts
        self._parts = TaskParts()

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Starts the prompt of a new task."""
        if self._parts.continues(strategy.experience):
            return
        # An interrupted task that is trained again has its prompt already.
        if len(self.prompts) <= strategy.clock.train_exp_counter:
            self.prompts.fold()
            reset_optimizer_state(strategy.optimizer, self.prompts.parameters())

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the task, to recognise its further parts."""
        self._parts.finish(strategy.experience)

    def state_dict(self) -> dict[str, Any]:
        """Returns prompts and keys of the past tasks, and their momentum."""
        return {
            "past": self.prompts.past_state(),
            "momentum": float(self.prompts.momentum),
            "task": self._parts.task,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the past prompts into the model; the momentum must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; the prompts are then unchanged.
        """
        check_keys(state, {"past", "momentum", "task"}, "the state of TaskPromptsPlugin")
        check_same_settings(state, {"momentum": self.prompts.momentum})
        self.prompts.load_past_state(state["past"])
        self._parts.task = state["task"]

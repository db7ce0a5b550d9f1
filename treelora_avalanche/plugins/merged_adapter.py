"""Sets the active adapter, after every experience, to the mean of all finished ones."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.state import check_keys


class MergedAdapterPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Predicts with, and starts the next experience from, the mean of all adapters learned so far.

    In TreeLoRA's Figure 2 the inner nodes of the tree are the adapters of groups of tasks; the
    root's is that of all. With θ_i the adapter at the end of experience i, the active adapter after
    experience n is ``(θ_1 + ... + θ_n) / n``. Every θ_i was trained from the mean of its
    predecessors, so the factors themselves can be averaged: none is far from the others. The mean
    is a running one; time and memory do not grow with the experiences.

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

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the mean so far, where training starts."""
        self._mean = LoRAFactors(strategy.model).stack.clone()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the experience to the mean."""
        self.n_experiences += 1
        # Exact in the first experience: the weight of the old mean is 0.
        LoRAFactors(strategy.model).stack.lerp_(self._mean, 1 - 1 / self.n_experiences)
        del self._mean

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of adapters in the mean; the mean itself is the active adapter."""
        return {"n_experiences": self.n_experiences}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        """
        check_keys(state, {"n_experiences"}, "the state of MergedAdapterPlugin")
        self.n_experiences = state["n_experiences"]

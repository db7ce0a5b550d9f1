"""After every task the live adapter becomes the mean of all finished ones: the root of the tree."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.state import check_keys


class MergedAdapterPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Answers, and starts the next experience, with the mean of all adapters learned so far.

    In TreeLoRA's picture (Figure 2) the inner nodes of the tree are the adapters of groups of
    tasks; the root's belongs to all. With theta_i the adapter at the end of experience i, after
    experience n the live one is set to (theta_1 + ... + theta_n) / n. Every theta_i was trained
    from the mean of those before it, so the factors themselves can be averaged: none has gone far
    from the others. A running mean: neither time nor memory grows with the experiences.

    Works with any strategy whose model carries LoRA. The classifier must fit the mean and not the
    adapter that was trained with it, so this plugin must come before a
    :class:`~treelora_avalanche.plugins.TaskAdaptiveHeadPlugin`; and after a
    :class:`~treelora_avalanche.plugins.TreeBuilderPlugin`, which keeps what the experience has
    learned. Task labels are not used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_experiences = 0

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Notes the mean so far, where the training starts."""
        self._mean = LoRAFactors(strategy.model).stack.clone()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Takes what was learned into the mean."""
        self.n_experiences += 1
        # In the first experience the mean is what was learned, to the last bit.
        LoRAFactors(strategy.model).stack.lerp_(self._mean, 1 - 1 / self.n_experiences)
        del self._mean

    def state_dict(self) -> dict[str, Any]:
        """The number of adapters in the mean; the mean itself is the live adapter."""
        return {"n_experiences": self.n_experiences}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where another plugin of this class has ended.

        :param state: what :meth:`state_dict` returned.
        """
        check_keys(state, {"n_experiences"}, "the state of MergedAdapterPlugin")
        self.n_experiences = state["n_experiences"]

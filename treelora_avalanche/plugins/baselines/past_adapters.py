"""A new adapter for every experience, next to the frozen ones of the past."""

from __future__ import annotations

from itertools import chain
from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.adapters import LoRAFactors, PastAdapters
from treelora_avalanche.state import check_keys, reset_optimizer_state


class PastAdaptersPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Freezes the adapter of an experience when the next one begins, and starts a new one.

    The common part of O-LoRA and InfLoRA. An adapter with B ≠ 0 at the start of an experience
    counts as past, so a trained adapter that the user brings along is frozen too. It is folded only
    then: the adapter that is saved after an experience is that experience's own. The optimizer's
    state of the old adapter is reset. Example::

        past = PastAdapters(model)
        strategy = Naive(model, plugins=[PastAdaptersPlugin(past)])

    :param past: the past adapters of the strategy's model.
    """

    requires_whole_adapter: str | None = "freezes a whole adapter per experience"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(self, past: PastAdapters):
        super().__init__()
        self.past = past

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Folds the adapter of the last experience."""
        self._factors = LoRAFactors(strategy.model)
        if any(b.detach().any() for _, b in self._factors.parameters):
            self.past.fold()
            reset_optimizer_state(strategy.optimizer, chain.from_iterable(self._factors.parameters))

    def state_dict(self) -> dict[str, Any]:
        """Returns the past adapters."""
        return {"past": self.past.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the past adapters into the model.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if they do not fit the model; it is then unchanged.
        """
        check_keys(state, {"past"}, f"the state of {type(self).__name__}")
        self.past.load_state_dict(state["past"])

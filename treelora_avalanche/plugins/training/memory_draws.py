"""Random states from which the samples of a replay memory were drawn."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.state import check_keys


class MemoryDrawsPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Records torch's random state at the end of every experience, 5 KB each.

    Avalanche's ``Replay`` draws its memory with the global generator, and keeps references into the
    stream's data. With this plugin it can be saved and continued: no sample is stored, the same
    ones are drawn again from the stream. Nothing that draws random numbers at the end of an
    experience may stand between this plugin and Avalanche's own, which comes last. Example::

        strategy = Replay(model=model, optimizer=optimizer, plugins=[MemoryDrawsPlugin()])
    """

    def __init__(self) -> None:
        super().__init__()
        self.random_states: list[Tensor] = []

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the state from which the memory is drawn next."""
        self.random_states.append(torch.get_rng_state())

    def state_dict(self) -> dict[str, Any]:
        """Returns the random states, one per experience."""
        return {"random_states": list(self.random_states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if keys are missing or unknown; the plugin is then unchanged.
        """
        check_keys(state, {"random_states"}, "the state of MemoryDrawsPlugin")
        self.random_states = list(state["random_states"])

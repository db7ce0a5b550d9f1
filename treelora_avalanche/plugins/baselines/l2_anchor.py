"""L2 regularisation towards the previous experience's adapter: the plain control."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.state import check_keys, check_same_settings


class L2AnchorPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Adds ``strength * ‖θ − θ_before‖²`` to the loss, from the second experience on.

    θ are the LoRA factors of all layers, θ_before their values at the end of the previous
    experience. The control for TreeLoRA's regularisation: it selects no task and is not sparse.
    Keeps one copy of the adapter during an experience, and nothing between experiences. Works with
    any strategy whose model carries LoRA. Task labels are not used. Example::

        strategy = SeqLoRA(model, plugins=[L2AnchorPlugin(strength=1.0)])

    :param strength: strength of the penalty.
    :raises ValueError: if ``strength`` is negative.
    """

    def __init__(self, strength: float = 1.0):
        super().__init__()
        if not strength >= 0:
            raise ValueError(
                f"`strength` should be at least 0, but is {strength}. Use 0 for no penalty."
            )
        self.strength = strength
        self._anchor: Tensor | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Copies the adapter of the previous experience."""
        pairs = LoRAFactors(strategy.model).parameters
        self._parameters = [parameter for pair in pairs for parameter in pair]
        self._anchor = None
        if strategy.clock.train_exp_counter > 0:
            self._anchor = parameters_to_vector(self._parameters).detach()  # (n_values,)

    def penalty(self) -> Tensor:
        """Returns the penalty of the active adapter, a scalar with a gradient to every factor.

        :raises RuntimeError: outside the training of an experience, and in the first.
        """
        if self._anchor is None:
            raise RuntimeError("the penalty needs a past adapter. Train a second experience.")
        difference = parameters_to_vector(self._parameters) - self._anchor
        return self.strength * difference.square().sum()

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the penalty to the loss."""
        if self._anchor is not None:
            strategy.loss = strategy.loss + self.penalty()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Deletes the copy."""
        self._anchor = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the strength, so that a stream is not continued with another."""
        return {"strength": float(self.strength)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the strength is the same; nothing is loaded.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if the strength differs.
        """
        check_keys(state, {"strength"}, "the state of L2AnchorPlugin")
        check_same_settings(state, {"strength": self.strength})

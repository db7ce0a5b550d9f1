"""A pull towards the adapter of the task before, in squared L2: the plain control."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.state import check_keys, check_same_settings


class L2AnchorPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Adds ``strength * ||theta - theta_before||^2`` to the loss from the second experience on.

    Theta are the LoRA factors of all layers, and theta_before their values at the end of the
    experience before. What TreeLoRA's pull must be better than: it picks no task and makes nothing
    sparse. Keeps one copy of the adapter while an experience is trained, and nothing from one to
    the next. Works with any strategy whose model carries LoRA. Task labels are not used.

    :param strength: strength of the pull.
    :raises ValueError: if ``strength`` is negative.
    """

    def __init__(self, strength: float = 1.0):
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"`strength` must be at least 0, and is {strength}.")
        self.strength = strength
        self._anchor: Tensor | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Copies the adapter as the experience before has left it."""
        pairs = LoRAFactors(strategy.model).parameters
        self._parameters = [parameter for pair in pairs for parameter in pair]
        self._anchor = None
        if strategy.clock.train_exp_counter > 0:
            self._anchor = parameters_to_vector(self._parameters).detach()  # (n_values,)

    def penalty(self) -> Tensor:
        """The penalty of the live adapter, a scalar that leads a gradient to every factor.

        :raises RuntimeError: if there is nothing to be pulled to: outside of the training of an
            experience, and in the first.
        """
        if self._anchor is None:
            raise RuntimeError("there is no adapter of an experience before to be pulled to.")
        difference = parameters_to_vector(self._parameters) - self._anchor
        return self.strength * difference.square().sum()

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the penalty to the loss."""
        if self._anchor is not None:
            strategy.loss = strategy.loss + self.penalty()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Lets the copy go."""
        self._anchor = None

    def state_dict(self) -> dict[str, Any]:
        """The strength, so that a stream is not continued with another by mistake."""
        return {"strength": float(self.strength)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the strength is the same; there is nothing to load.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if the strength differs.
        """
        check_keys(state, {"strength"}, "the state of L2AnchorPlugin")
        check_same_settings(state, {"strength": self.strength})

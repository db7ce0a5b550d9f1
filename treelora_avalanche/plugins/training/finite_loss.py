"""Stops at the first non-finite loss, with the weights from before the experience."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.state import check_keys


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


class FiniteLossPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Stops the training of an experience when its loss becomes NaN or infinite.

    The trainable weights return to their values before the experience, so nothing learned before is
    lost. On the CPU the loss is checked after every step, on an accelerator after every epoch
    (reading it earlier would synchronise every step). Task labels are not used. Example::

        strategy = SeqLoRA(model, plugins=[FiniteLossPlugin()])

    :raises NonFiniteLossError: from ``strategy.train``, naming the experience and the step.
    """

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Copies the trainable weights."""
        self._before = {
            name: parameter.detach().clone()
            for name, parameter in strategy.model.named_parameters()
            if parameter.requires_grad
        }
        self._step = 0
        self._first_bad = torch.full((), -1, device=strategy.device)

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the first step whose loss is not finite."""
        bad = ~torch.isfinite(strategy.loss.detach()).all()
        self._first_bad = torch.where(bad & (self._first_bad < 0), self._step, self._first_bad)
        self._step += 1
        if self._first_bad.device.type == "cpu":
            self._stop_if_bad(strategy)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stops the training if a loss of the epoch was not finite."""
        self._stop_if_bad(strategy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Deletes the copy of the weights."""
        self._before.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: nothing outlives an experience."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the state is empty.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it is not empty.
        """
        check_keys(state, (), "the state of FiniteLossPlugin")

    def _stop_if_bad(self, strategy: Any) -> None:
        step = int(self._first_bad)
        if step < 0:
            return
        with torch.no_grad():
            for name, parameter in strategy.model.named_parameters():
                if name in self._before:
                    parameter.copy_(self._before[name])
        raise NonFiniteLossError(
            f"the loss should be finite, but became NaN or infinite at step {step} of experience "
            f"{strategy.experience.current_experience}. The weights are those from before the "
            "experience. Try a smaller learning rate."
        )

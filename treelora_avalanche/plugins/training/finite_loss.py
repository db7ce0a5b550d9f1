"""Stop at the first loss that is not a number, with the weights from before the experience."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.state import check_keys


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


class FiniteLossPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Stops the training of an experience when its loss becomes NaN or infinite.

    The trainable weights go back to where they were before the experience, so nothing learned
    before is lost. On the CPU the loss is looked at after every step, on an accelerator after every
    epoch (reading it earlier would make the host wait in every step). Task labels are not used.

    :raises NonFiniteLossError: out of ``strategy.train``, naming the experience and the step.
    """

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Remembers the trainable weights."""
        self._before = {
            name: parameter.detach().clone()
            for name, parameter in strategy.model.named_parameters()
            if parameter.requires_grad
        }
        self._step = 0
        self._first_bad = torch.full((), -1, device=strategy.device)

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Notes the first step whose loss is not finite."""
        bad = ~torch.isfinite(strategy.loss.detach()).all()
        self._first_bad = torch.where(bad & (self._first_bad < 0), self._step, self._first_bad)
        self._step += 1
        if self._first_bad.device.type == "cpu":
            self._stop_if_bad(strategy)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stops the training if a loss of the epoch was not finite."""
        self._stop_if_bad(strategy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Forgets the remembered weights."""
        self._before.clear()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all it remembers ends with the experience."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that there is nothing to load.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if there is something.
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
            f"the loss became NaN or infinite at step {step} of experience "
            f"{strategy.experience.current_experience}; the weights are those from before the "
            "experience. Try a smaller learning rate."
        )

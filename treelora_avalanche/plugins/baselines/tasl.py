"""Skill localization and consolidation of TaSL (Feng et al. 2024, arXiv 2408.05200)."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.state import check_keys, check_same_settings

SMOOTHING = 0.85
"""Share of the past in the running means of sensitivity and uncertainty, α_1 and α_2."""


def normalized(importance: Tensor) -> Tensor:
    """Returns importances scaled to the range from 0 to 1; zeros where all are equal.

    :param importance: ``(n_units,)``.
    """
    low, high = importance.aminmax()
    tiny = torch.finfo(importance.dtype).tiny
    return (importance - low) / (high - low).clamp(min=tiny)


def new_shares(past: Tensor, current: Tensor, important: float, past_weight: float) -> Tensor:
    """Returns the share of the new adapter in each unit of the consolidated one (the paper's Eq.
    9).

    A unit important to past and new is mixed, ``γ old + (1 − γ) new``; one important only to the
    past keeps its old value; one important only to the new task takes the new value; one important
    to neither is the average.

    :param past: accumulated importance before the task, ``(n_units,)``.
    :param current: importance for the task, ``(n_units,)``.
    :param important: share of the units that count as important to a task.
    :param past_weight: share of the past in units important to both, γ.
    :return: ``(n_units,)``, 0: past, 1: new.
    """
    for_past = past >= past.quantile(1 - important)
    for_new = current >= current.quantile(1 - important)
    shares = torch.full_like(current, 0.5)
    shares[for_past & for_new] = 1 - past_weight
    shares[for_past & ~for_new] = 0.0
    shares[~for_past & for_new] = 1.0
    return shares


class TaSLPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Localises the skill units of every task, and consolidates its adapter with the previous one.

    A skill unit is one LoRA matrix, A or B of a layer. Its importance is the mean over its values
    of ``mean(I) * mean(|I − mean(I)|)``, with sensitivity ``I = |w dL/dw|`` and running means over
    the steps of the task. After a task each unit becomes the old one, the new one, or a mixture
    (:func:`new_shares`), and training continues from there. The normalised importances of past
    tasks are accumulated with the share ``past_importance`` of the past.

    Costs some elementwise operations per step, on lists of all factors at once; holds two running
    means and a copy of the adapter during a task. Stores one number per unit, for any number of
    tasks: the adapter before a task is the one it starts from. Task labels are not used. Example::

        strategy = SeqLoRA(language_model, plugins=[TaSLPlugin()])

    :param important: share of the units that count as important to a task; 0.2 in the paper.
    :param past_weight: share of the past in a unit important to both, γ; 0.7 in the paper.
    :param past_importance: share of the past in the accumulated importance, β; 0.7 in the paper.
    :raises ValueError: if a share is not between 0 and 1.
    """

    requires_whole_adapter: str | None = "consolidates the whole adapter after every experience"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(
        self, important: float = 0.2, past_weight: float = 0.7, past_importance: float = 0.7
    ):
        super().__init__()
        self.important = important
        self.past_weight = past_weight
        self.past_importance = past_importance
        for name, share in self._shares().items():
            if not 0 <= share <= 1:
                raise ValueError(
                    f"`{name}` should be between 0 and 1, but is {share}. Pass a share."
                )
        self.importance: Tensor | None = None
        """Accumulated importance, ``(n_units,)``: A and B of the first layer, of the second, ..."""

    def _shares(self) -> dict[str, float]:
        names = ("important", "past_weight", "past_importance")
        return {name: float(getattr(self, name)) for name in names}

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Copies the adapter, and resets the running means."""
        pairs = LoRAFactors(strategy.model).parameters
        self._units: list[Tensor] = [unit for pair in pairs for unit in pair]
        if self.importance is not None:
            if len(self.importance) != len(self._units):
                raise ValueError(
                    f"the trained adapter should have {len(self.importance)} matrices, as the "
                    f"stored importances, but has {len(self._units)}. Train the same ones in every "
                    "experience."
                )
            self.importance = self.importance.to(self._units[0].device)
        self._start = [unit.detach().clone() for unit in self._units]
        self._sensitivity = [torch.zeros_like(unit.detach()) for unit in self._units]
        self._uncertainty = [torch.zeros_like(unit.detach()) for unit in self._units]

    @torch.no_grad()
    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the step's gradient, of all its batches, to the running means."""
        gradients = [unit.grad for unit in self._units if unit.grad is not None]
        sensitivity = list(torch._foreach_mul(self._units, gradients))
        torch._foreach_abs_(sensitivity)
        torch._foreach_lerp_(self._sensitivity, sensitivity, 1 - SMOOTHING)
        deviation = list(torch._foreach_sub(sensitivity, self._sensitivity))
        torch._foreach_abs_(deviation)
        torch._foreach_lerp_(self._uncertainty, deviation, 1 - SMOOTHING)

    def unit_importance(self) -> Tensor:
        """Returns the importance of each unit for the task so far, ``(n_units,)``."""
        scores = torch._foreach_mul(self._sensitivity, self._uncertainty)
        return torch.stack([score.mean() for score in scores])

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Consolidates the adapter, from the second experience on."""
        current = normalized(self.unit_importance())
        if self.importance is None:
            self.importance = current
        else:
            shares = new_shares(self.importance, current, self.important, self.past_weight)
            for unit, start, share in zip(self._units, self._start, shares, strict=True):
                unit.copy_(start.lerp(unit, share))
            self.importance = normalized(self.importance.lerp(current, 1 - self.past_importance))
        del self._units, self._start, self._sensitivity, self._uncertainty

    def state_dict(self) -> dict[str, Any]:
        """Returns the accumulated importance, not copied, and the shares."""
        return {"importance": self.importance, **self._shares()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class; its shares must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; the plugin is then unchanged.
        """
        check_keys(state, self.state_dict(), "the state of TaSLPlugin")
        check_same_settings(state, self._shares())
        importance = state["importance"]
        self.importance = None if importance is None else importance.detach().clone()

"""Orthogonality penalty of O-LoRA (Wang et al., EMNLP Findings 2023, arXiv 2310.14152)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from treelora_avalanche.adapters import PastAdapters
from treelora_avalanche.plugins.baselines.past_adapters import PastAdaptersPlugin
from treelora_avalanche.state import check_keys, check_same_settings


def overlap(past: Tensor, active: Tensor) -> Tensor:
    """Returns ``Σ_l ‖A_past^l (A^l)ᵀ‖_F²``, the squared inner products of past and active rows of
    A.

    :param past: ``(n_layers, n_past_rows, n_in)``.
    :param active: ``(n_layers, rank, n_in)``.
    :return: a scalar.
    """
    return torch.bmm(past, active.transpose(1, 2)).square().sum()


class OLoRAPlugin(PastAdaptersPlugin):
    """Trains a new adapter in every experience, its A orthogonal to those of the past.

    Adds ``orthogonality * Σ_i ‖A_i Aᵀ‖_F²``, over all layers and past tasks i, to the loss from the
    second experience on, as in the paper. Its released code sums absolute values, whose gradient
    does not vanish near zero and oscillates there. The cost grows with the number of past tasks:
    one batched product for all of them and all layers of a shape. Works with any strategy whose
    model carries LoRA. Task labels are not used. Example::

        past = PastAdapters(model)
        strategy = Naive(model, plugins=[OLoRAPlugin(past, orthogonality=0.5)])

    :param past: the past adapters of the strategy's model.
    :param orthogonality: strength λ_1 of the penalty.
    :raises ValueError: if ``orthogonality`` is negative.
    """

    def __init__(self, past: PastAdapters, orthogonality: float = 0.5):
        super().__init__(past)
        if not orthogonality >= 0:
            raise ValueError(
                f"`orthogonality` should be at least 0, but is {orthogonality}. Use 0 for no "
                "penalty."
            )
        self.orthogonality = orthogonality
        self._layers: list[tuple[Tensor, list[Tensor]]] = []

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Folds the last adapter, and stacks the past A of layers of equal shape."""
        super().before_training_exp(strategy, *args, **kwargs)
        of_shape = defaultdict(list)
        for (a, _), (past, _) in zip(self._factors.parameters, self.past.factors, strict=True):
            of_shape[a.shape].append((past, a))
        self._layers = [
            (torch.stack([past for past, _ in pairs]), [a for _, a in pairs])
            for pairs in of_shape.values()
            if len(self.past)
        ]

    def penalty(self) -> Tensor:
        """Returns the penalty of the active adapter, a scalar with a gradient to every A."""
        overlaps = [overlap(past, torch.stack(active)) for past, active in self._layers]
        return self.orthogonality * torch.stack(overlaps).sum()

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the penalty to the loss."""
        if self._layers:
            strategy.loss = strategy.loss + self.penalty()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Deletes the stacked copies."""
        super().after_training_exp(strategy, *args, **kwargs)
        self._layers = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the past adapters, and the strength."""
        return {**super().state_dict(), "orthogonality": float(self.orthogonality)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the past adapters into the model; the strength must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; nothing has changed then.
        """
        check_keys(state, {"past", "task", "orthogonality"}, "the state of OLoRAPlugin")
        check_same_settings(state, {"orthogonality": self.orthogonality})
        super().load_state_dict({"past": state["past"], "task": state["task"]})

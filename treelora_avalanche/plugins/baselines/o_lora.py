"""Orthogonality penalty of O-LoRA (Wang et al., EMNLP Findings 2023, arXiv 2310.14152)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from treelora_avalanche.adapters import PastAdapters
from treelora_avalanche.choices import check_known
from treelora_avalanche.plugins.baselines.past_adapters import PastAdaptersPlugin
from treelora_avalanche.state import check_keys, check_same_settings

NORMS = ("absolute", "squared")


def overlap(past: Tensor, active: Tensor, norm: str = "squared") -> Tensor:
    """Returns the sum of the inner products of past and active rows of A, all positive.

    ``Σ_l ‖A_past^l (A^l)ᵀ‖_F²`` of their squares, or ``Σ_l ‖A_past^l (A^l)ᵀ‖_1`` of their absolute
    values.

    :param past: ``(n_layers, n_past_rows, n_in)``.
    :param active: ``(n_layers, rank, n_in)``.
    :param norm: ``"squared"`` or ``"absolute"``.
    :return: a scalar.
    """
    products = torch.bmm(past, active.transpose(1, 2))
    return (products.square() if norm == "squared" else products.abs()).sum()


class OLoRAPlugin(PastAdaptersPlugin):
    """Trains a new adapter in every experience, its A orthogonal to those of the past.

    Adds ``orthogonality * Σ_i ‖A_i Aᵀ‖``, over all layers and past tasks i, to the loss from the
    second experience on. The paper squares the inner products of rows, its released code takes
    absolute values. These are far stronger: inner products are small, and their gradient is not,
    but keeps its size until it changes sign. The cost grows with the number of past tasks: one
    batched product for all of them and all layers of a shape. Works with any strategy whose model
    carries LoRA. Task labels are not used. Example::

        past = PastAdapters(model)
        strategy = Naive(model, plugins=[OLoRAPlugin(past, orthogonality=0.5)])

    :param past: the past adapters of the strategy's model.
    :param orthogonality: strength λ_1 of the penalty.
    :param norm: ``"absolute"`` or ``"squared"``, see :func:`overlap`.
    :raises ValueError: if ``orthogonality`` is negative, or ``norm`` unknown.
    """

    def __init__(self, past: PastAdapters, orthogonality: float = 0.5, norm: str = "absolute"):
        super().__init__(past)
        check_known("`norm`", norm, NORMS)
        if not orthogonality >= 0:
            raise ValueError(
                f"`orthogonality` should be at least 0, but is {orthogonality}. Use 0 for no "
                "penalty."
            )
        self.orthogonality = orthogonality
        self.norm = norm
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
        overlaps = [overlap(past, torch.stack(active), self.norm) for past, active in self._layers]
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
        """Returns the past adapters, and the settings of the penalty."""
        return {**super().state_dict(), **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {"orthogonality": float(self.orthogonality), "norm": self.norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the past adapters into the model; the penalty's settings must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; nothing has changed then.
        """
        check_keys(state, {"past", "task", *self._settings()}, "the state of OLoRAPlugin")
        check_same_settings(state, self._settings())
        super().load_state_dict({"past": state["past"], "task": state["task"]})

"""Retrains the head of a class-incremental stream, after every task, on pseudo-features."""

from __future__ import annotations

from typing import Any

import torch

from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.models.features.gaussians import StatisticsKind, train_head
from treelora_avalanche.plugins.class_statistics import ClassStatisticsPlugin


class TrainedHeadPlugin(ClassStatisticsPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Retrains the classifier after every task on pseudo-features drawn around the class means.

    HiDe-Prompt (Wang et al., NeurIPS 2023) calls it task-adaptive prediction.
    :class:`~treelora_avalanche.plugins.TaskAdaptiveHeadPlugin` has the same statistics, in closed
    form. Costs and limits are those of :class:`ClassStatisticsPlugin`. Example::

        strategy = SeqLoRA(model, plugins=[TrainedHeadPlugin(seed=0)])

    :param epochs: number of optimisation steps of the retraining.
    :param n_per_class: pseudo-features per class and step.
    :param learning_rate: learning rate of the retraining.
    :param kind: the statistics of a class,
        :class:`~treelora_avalanche.models.features.gaussians.Gaussians` by default, or
        :class:`~treelora_avalanche.models.features.centroids.Centroids`.
    :param seed: seed of the pseudo-features.
    """

    temperature: float | None = None
    """See :func:`~treelora_avalanche.models.features.gaussians.train_head`."""

    def __init__(
        self,
        *,
        epochs: int = 120,
        n_per_class: int = 16,
        learning_rate: float = 0.01,
        kind: StatisticsKind | None = None,
        seed: int = 0,
    ):
        super().__init__(kind)
        self.epochs = epochs
        self.n_per_class = n_per_class
        self.learning_rate = learning_rate
        self.seed = seed

    def fit_head(self, strategy: Any) -> None:
        train_head(
            classifier_of(strategy.model),
            self.kind.draws(self.statistics),
            epochs=self.epochs,
            n_per_class=self.n_per_class,
            learning_rate=self.learning_rate,
            generator=torch.Generator().manual_seed(self.seed + self.n_tasks),
            temperature=self.temperature,
        )

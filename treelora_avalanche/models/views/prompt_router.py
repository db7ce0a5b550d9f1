"""Router of prompts: the task that a prompt belongs to, or none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from treelora_avalanche.models.features.discriminant import Discriminant

NO_ADAPTER = -1
"""In place of an index in the bank: the model without an adapter."""


class Route(NamedTuple):
    """The adapter that one prompt gets, and why.

    Example::

        route = strategy.route(["Translate to German: good morning"])[0]
        route.task is None  # foreign: distance > threshold, so that the base model generates

    :param task: number of the task, in the order of training, whose adapter the prompt gets; None
        for the base model.
    :param task_name: name of that task; None for the base model.
    :param nearest: name of the most probable task, also where the prompt is foreign.
    :param probability: probability of the most probable task among the known ones.
    :param distance: Mahalanobis distance to the most probable task.
    :param threshold: distance beyond which a prompt is foreign.
    """

    task: int | None
    task_name: str | None
    nearest: str
    probability: float
    distance: float
    threshold: float


class PromptRouter(NamedTuple):
    """Selects the adapter of the most probable task, and none for a foreign prompt.

    >>> router(torch.zeros(1, 576))  # index in the bank; -1: no adapter
    tensor([2])

    :param discriminant: the Gaussians of the tasks.
    :param adapter: index in the bank of each task's adapter, ``(n_tasks,)``.
    :param tasks: number of each task, in the order of training.
    :param names: name of each task.
    :param threshold: distance to the nearest task beyond which a prompt is foreign; infinite for
        never.
    :param spread: mean of ``d^2 / dim`` of prompts that were left out of the fit, which is 1 for a
        covariance that is known. Few prompts give one too small, and probabilities too extreme.
    """

    discriminant: Discriminant
    adapter: Tensor
    tasks: tuple[int, ...]
    names: tuple[str, ...]
    threshold: float
    spread: float

    def __call__(self, features: Tensor) -> Tensor:
        """Returns the adapter of each prompt, an index in the bank or -1, ``(batch,)``.

        :param features: ``(batch, dim)``, see :class:`RoutedLanguageModel`.
        """
        distance, nearest = self.discriminant.distances(features).min(1)
        return torch.where(distance > self.threshold, NO_ADAPTER, self.adapter[nearest])

    def routes(self, features: Tensor) -> list[Route]:
        """Returns the route of each prompt.

        :param features: see :meth:`__call__`.
        """
        distances = self.discriminant.distances(features)  # (batch, n_tasks)
        probability = (-distances.square() / (2 * self.spread)).softmax(1)
        return [
            self._route(k, p[k], d[k])
            for k, p, d in zip(
                distances.argmin(1).tolist(), probability.tolist(), distances.tolist(), strict=True
            )
        ]

    def _route(self, nearest: int, probability: float, distance: float) -> Route:
        foreign = distance > self.threshold
        return Route(
            task=None if foreign else self.tasks[nearest],
            task_name=None if foreign else self.names[nearest],
            nearest=self.names[nearest],
            probability=probability,
            distance=distance,
            threshold=self.threshold,
        )

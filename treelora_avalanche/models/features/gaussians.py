"""Classes as Gaussians: what is remembered of their features, and a head trained on draws.

Tensor in, tensor out; the hooks that use it are in ``plugins/task_adaptive_head.py`` and
``plugins/router.py``. Task-adaptive prediction in HiDe-Prompt (Wang et al., NeurIPS 2023) and
classifier alignment in SLCA (Zhang et al., ICCV 2023) are of this kind. HiDe's own statistics, by
centroids, are in ``models/centroids.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from treelora_avalanche.state import check_keys

Statistics = TypeVar("Statistics", bound="Any")


class Draws(Protocol):
    """A source of pseudo-features."""

    labels: Tensor
    """ Of the classes, ``(n_classes,)``. """

    @property
    def dim(self) -> int:
        """Size of a feature."""

    def draw(self, n_per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features ``(n_classes * n_per_class, dim)`` and their labels; see :class:`Gaussians`."""


class StatisticsKind(Protocol):
    """What is remembered of a class: :class:`Gaussians`, or centroids (``models/centroids.py``).

    The statistics of a class are a named tuple with ``label``, ``task``, tensors, ``dim`` (the size
    of a feature), and ``moved``.
    """

    def of(self, features: Tensor, targets: Tensor, task: int) -> list[Any]:
        """Statistics of all classes of a task, from features ``(n_samples, dim)``."""

    def draws(self, statistics: Sequence[Any]) -> Draws:
        """A source of features as the classes would have them."""

    def load(self, state: list[dict[str, Any]]) -> list[Any]:
        """The statistics that :func:`statistics_state` was given."""


class ClassStatistics(NamedTuple):
    """A class, as the features of one task have shown it.

    :param label: the class.
    :param task: number of the task, in the order of training.
    :param mean: mean of the features, ``(dim,)``.
    :param factor: ``(n, dim)``; the covariance is ``factor.T @ factor``. As a factor it is never
        too singular to draw from: a class of a single sample has ``n = 0``.
    """

    label: int
    task: int
    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, label: int, task: int, features: Tensor, max_rank: int = 64) -> ClassStatistics:
        """Statistics of a class.

        :param label: the class.
        :param task: number of the task.
        :param features: all features of the class in this task, ``(n_samples, dim)``.
        :param max_rank: directions kept of the covariance, the widest first.
        """
        mean = features.mean(0)
        n = len(features)
        factor = (features - mean) / max(1, n - 1) ** 0.5
        if n > max_rank:
            _, s, vh = torch.linalg.svd(factor, full_matrices=False)
            factor = s[:max_rank, None] * vh[:max_rank]
        return cls(label, task, mean, factor if n > 1 else factor[:0])

    @property
    def dim(self) -> int:
        """Size of a feature."""
        return self.mean.shape[0]

    def moved(self, weight: Tensor, bias: Tensor) -> ClassStatistics:
        """The statistics after the features have moved by ``x -> x + x @ weight + bias``."""
        return self._replace(
            mean=self.mean + self.mean @ weight + bias, factor=self.factor + self.factor @ weight
        )


def statistics_state(statistics: Sequence[Any]) -> list[dict[str, Any]]:
    """Statistics as tensors and plain values, to be saved.

    :param statistics: the classes.
    """
    return [s._asdict() for s in statistics]


def load_statistics(kind: type[Statistics], state: list[dict[str, Any]]) -> list[Statistics]:
    """The statistics that :func:`statistics_state` was given.

    :param kind: their class.
    :param state: what it returned.
    :raises ValueError: if they are of another kind.
    """
    for plain in state:
        where = f"the statistics of a class, as {kind.__name__},"
        check_keys(plain, kind._fields, where, "Load them with the `kind` that they are of.")
    return [kind(**plain) for plain in state]


def move_statistics(statistics: Sequence[Any], device: torch.device | str) -> list[Any]:
    """The statistics on another device; loaded ones come on the CPU.

    :param statistics: the classes.
    :param device: where to.
    """

    def moved(s: Any) -> Any:
        tensors = {name: v.to(device) for name, v in s._asdict().items() if isinstance(v, Tensor)}
        return s._replace(**tensors)

    return [moved(s) for s in statistics]


class PseudoFeatures:
    """Draws features as the classes would have them.

    A class of few samples knows little of its own covariance. Therefore each class is drawn with
    ``(1 - shrinkage)`` of its own and ``shrinkage`` of the mean covariance of all classes.

    :param statistics: the classes.
    :param shrinkage: share of the mean covariance, between 0 and 1.
    """

    def __init__(self, statistics: Sequence[ClassStatistics], shrinkage: float = 0.5):
        self.statistics = list(statistics)
        self.labels = torch.tensor(
            [s.label for s in statistics], device=statistics[0].mean.device
        )  # (n_classes,)
        self._means = torch.stack([s.mean for s in statistics])
        self._own = (1 - shrinkage) ** 0.5
        rank = max(len(s.factor) for s in statistics)
        # Rows of zeros add nothing to a covariance.
        self._factors = torch.stack(
            [nn.functional.pad(s.factor, (0, 0, 0, rank - len(s.factor))) for s in statistics]
        )  # (n_classes, rank, dim)
        pooled = torch.cat([s.factor for s in statistics])
        covariance = pooled.T @ pooled / len(self.statistics)
        values, vectors = torch.linalg.eigh(covariance)
        # Not a Cholesky factor: with few samples the mean covariance is singular too.
        self._shared = (shrinkage * values.clamp(min=0)).sqrt()[:, None] * vectors.T  # (dim, dim)

    @property
    def dim(self) -> int:
        """Size of a feature."""
        return self._means.shape[1]

    def draw(self, n_per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws from every class.

        :param n_per_class: features per class.
        :param generator: source of randomness, on the CPU.
        :return: features ``(n_classes * n_per_class, dim)``, and their labels.
        """
        n_classes, rank, dim = self._factors.shape
        device = self._means.device
        own = torch.randn(n_classes, n_per_class, rank, generator=generator).to(device)
        shared = torch.randn(n_classes, n_per_class, dim, generator=generator).to(device)
        features = self._own * torch.bmm(own, self._factors) + shared @ self._shared
        features = features + self._means[:, None]
        return features.flatten(0, 1), self.labels.repeat_interleave(n_per_class)


@dataclass(frozen=True)
class Gaussians:
    """Classes as Gaussians, the default kind of statistics.

    :param max_rank: see :meth:`ClassStatistics.of`.
    :param shrinkage: see :class:`PseudoFeatures`.
    """

    max_rank: int = 64
    shrinkage: float = 0.5

    def of(self, features: Tensor, targets: Tensor, task: int) -> list[ClassStatistics]:
        """Statistics of all classes of a task.

        :param features: ``(n_samples, dim)``.
        :param targets: their classes, ``(n_samples,)``.
        :param task: number of the task.
        """
        return [
            ClassStatistics.of(label, task, features[targets == label], self.max_rank)
            for label in targets.unique().tolist()
        ]

    def draws(self, statistics: Sequence[ClassStatistics]) -> PseudoFeatures:
        """A source of pseudo-features.

        :param statistics: the classes.
        """
        return PseudoFeatures(statistics, self.shrinkage)

    def load(self, state: list[dict[str, Any]]) -> list[ClassStatistics]:
        """The statistics that :func:`statistics_state` was given.

        :param state: what it returned.
        """
        return load_statistics(ClassStatistics, state)


def train_head(
    head: nn.Linear,
    pseudo_features: Draws,
    *,
    epochs: int,
    n_per_class: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    """Trains a classifier, in place, on pseudo-features of the classes seen so far.

    Outputs of classes never seen are left out of the loss, and their weights as they are. All
    classes weigh the same, also one with statistics of several tasks.

    :param head: the classifier.
    :param pseudo_features: where the features come from.
    :param epochs: steps; every one draws anew.
    :param n_per_class: features per class and step.
    :param learning_rate: of Adam, falling to 0 along a cosine.
    :param generator: source of randomness, on the CPU.
    """
    seen, rows = pseudo_features.labels.unique(return_inverse=True)
    weight = head.weight.detach()[seen].requires_grad_()
    bias = head.bias.detach()[seen].requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    targets = rows.repeat_interleave(n_per_class)
    weights = rows.bincount().to(weight.dtype).reciprocal()  # (n_classes_seen,)
    with torch.enable_grad():
        for _ in range(epochs):
            features, _ = pseudo_features.draw(n_per_class, generator)
            loss = nn.functional.cross_entropy(features @ weight.T + bias, targets, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        head.weight[seen] = weight
        head.bias[seen] = bias


def feature_drift(before: Tensor, after: Tensor, ridge: float = 0.01) -> tuple[Tensor, Tensor]:
    """The linear map by which a task's training has moved the features, by least squares.

    Where old classes have gone is read from what has happened to the current images.

    :param before: features of the current images before the task, ``(n_samples, dim)``.
    :param after: features of the same images after it.
    :param ridge: pulls the map towards a mere shift: share of the features' total variance that is
        added in every direction. A task has few images, and a free map would follow their noise.
    :return: ``weight (dim, dim)`` and ``bias (dim,)`` of ``x -> x + x @ weight + bias``.
    """
    center, moved = before.mean(0), (after - before).mean(0)
    x, y = before - center, after - before - moved
    gram = x.T @ x
    # Images that are all alike differ by rounding errors alone, which a map must not follow either.
    limits = torch.finfo(gram.dtype)
    rounding = limits.eps * len(x) * center.square().sum() + limits.tiny
    gram.diagonal().add_(ridge * gram.diagonal().sum() + rounding)
    weight = torch.linalg.solve(gram, x.T @ y)
    return weight, moved - center @ weight

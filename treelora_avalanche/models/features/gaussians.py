"""Class statistics as Gaussians, pseudo-features drawn from them, and a head trained on these.

Tensor in, tensor out; the hooks that use it are in ``plugins/task_adaptive_head.py`` and
``plugins/router.py``. Task-adaptive prediction in HiDe-Prompt (Wang et al., NeurIPS 2023) and
classifier alignment in SLCA (Zhang et al., ICCV 2023) are of this kind. HiDe's own statistics, by
centroids, are in ``centroids``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters.trainable_view import at_least_float32
from treelora_avalanche.state import check_keys

Statistics = TypeVar("Statistics", bound="Any")


class Draws(Protocol):
    """Source of pseudo-features."""

    labels: Tensor
    """Labels of the classes, ``(n_classes,)``."""

    @property
    def dim(self) -> int:
        """Dimension of the features."""

    def draw(self, n_per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns features ``(n_classes * n_per_class, dim)`` and their labels."""


class StatisticsKind(Protocol):
    """Kind of class statistics: :class:`Gaussians`, or ``Centroids``.

    The statistics of a class are a named tuple of ``label``, ``task`` and tensors, with ``dim`` and
    ``moved``, as :class:`ClassStatistics`.
    """

    def of(self, features: Tensor, targets: Tensor, task: int) -> list[Any]:
        """Returns the statistics of all classes of a task, from features ``(n_samples, dim)``."""

    def draws(self, statistics: Sequence[Any]) -> Draws:
        """Returns a source of pseudo-features of the classes."""

    def load(self, state: list[dict[str, Any]]) -> list[Any]:
        """Returns the statistics of a :func:`statistics_state`."""


class ClassStatistics(NamedTuple):
    """Mean and covariance of the features of a class in one task::

        statistics = ClassStatistics.of(label=3, task=0, features=features)

    :param label: the class.
    :param task: number of the task, in the order of training.
    :param mean: mean of the features, ``(dim,)``.
    :param factor: ``(n, dim)``; the covariance is ``factor.T @ factor``. A factor, unlike the
        covariance, is never too singular to draw from: a single sample has ``n = 0``.
    """

    label: int
    task: int
    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, label: int, task: int, features: Tensor, max_rank: int = 64) -> ClassStatistics:
        """Returns the statistics of a class.

        :param label: the class.
        :param task: number of the task.
        :param features: all features of the class in this task, ``(n_samples, dim)``.
        :param max_rank: number of directions kept of the covariance, the widest first.
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
        """Dimension of the features."""
        return self.mean.shape[0]

    def moved(self, weight: Tensor, bias: Tensor) -> ClassStatistics:
        """Returns the statistics under the map ``x -> x + x @ weight + bias`` of the features."""
        return self._replace(
            mean=self.mean + self.mean @ weight + bias, factor=self.factor + self.factor @ weight
        )


def statistics_state(statistics: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns statistics as tensors and plain values, to be saved.

    :param statistics: statistics of the classes.
    """
    return [s._asdict() for s in statistics]


def load_statistics(kind: type[Statistics], state: list[dict[str, Any]]) -> list[Statistics]:
    """Returns the statistics of a :func:`statistics_state`.

    :param kind: their class.
    :param state: the state.
    :raises ValueError: if they are of another kind.
    """
    for plain in state:
        where = f"the statistics of a class, as {kind.__name__},"
        check_keys(plain, kind._fields, where, "Load them with the `kind` that saved them.")
    return [kind(**plain) for plain in state]


def move_statistics(statistics: Sequence[Any], device: torch.device | str) -> list[Any]:
    """Returns the statistics on another device; loaded ones are on the CPU.

    :param statistics: statistics of the classes.
    :param device: the device.
    """

    def moved(s: Any) -> Any:
        tensors = {name: v.to(device) for name, v in s._asdict().items() if isinstance(v, Tensor)}
        return s._replace(**tensors)

    return [moved(s) for s in statistics]


def stacked_factors(statistics: Sequence[ClassStatistics]) -> Tensor:
    """Returns the factors of all covariances in one tensor, ``(n_classes, rank, dim)``.

    Rows of zeros, which leave a covariance unchanged, are added to those of lower rank.

    :param statistics: statistics of the classes.
    """
    rank = max(len(s.factor) for s in statistics)
    return torch.stack(
        [nn.functional.pad(s.factor, (0, 0, 0, rank - len(s.factor))) for s in statistics]
    )


class PseudoFeatures:
    """Draws features from the Gaussians of classes, whose covariances are shrunk to their mean.

    The covariance of a class with few samples is a poor estimate. Therefore class c is drawn from
    ``N(mean_c, (1 - shrinkage) * cov_c + shrinkage * mean(cov))``::

        features, labels = PseudoFeatures(statistics).draw(16, torch.Generator())

    :param statistics: statistics of the classes.
    :param shrinkage: share of the mean covariance, between 0 and 1.
    """

    def __init__(self, statistics: Sequence[ClassStatistics], shrinkage: float = 0.5):
        self.statistics = list(statistics)
        self.labels = torch.tensor(
            [s.label for s in statistics], device=statistics[0].mean.device
        )  # (n_classes,)
        self._means = torch.stack([s.mean for s in statistics])
        self._own = (1 - shrinkage) ** 0.5
        self._factors = stacked_factors(statistics)
        pooled = torch.cat([s.factor for s in statistics])
        covariance = pooled.T @ pooled / len(self.statistics)
        values, vectors = torch.linalg.eigh(covariance)
        # Not by Cholesky: with few samples the mean covariance is singular too.
        self._shared = (shrinkage * values.clamp(min=0)).sqrt()[:, None] * vectors.T  # (dim, dim)

    @property
    def dim(self) -> int:
        """Dimension of the features."""
        return self._means.shape[1]

    def draw(self, n_per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws features of every class.

        :param n_per_class: number of features per class.
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
    """Gaussians as the :class:`StatisticsKind`, the default::

        kind = Gaussians()
        source = kind.draws(kind.of(features, targets, task=0))

    :param max_rank: see :meth:`ClassStatistics.of`.
    :param shrinkage: see :class:`PseudoFeatures`.
    """

    max_rank: int = 64
    shrinkage: float = 0.5

    def of(self, features: Tensor, targets: Tensor, task: int) -> list[ClassStatistics]:
        """Returns the statistics of all classes of a task.

        :param features: ``(n_samples, dim)``.
        :param targets: their classes, ``(n_samples,)``.
        :param task: number of the task.
        """
        return [
            ClassStatistics.of(label, task, features[targets == label], self.max_rank)
            for label in targets.unique().tolist()
        ]

    def draws(self, statistics: Sequence[ClassStatistics]) -> PseudoFeatures:
        """Returns a source of pseudo-features.

        :param statistics: statistics of the classes.
        """
        return PseudoFeatures(statistics, self.shrinkage)

    def load(self, state: list[dict[str, Any]]) -> list[ClassStatistics]:
        """Returns the statistics of a :func:`statistics_state`.

        :param state: the state.
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
    temperature: float | None = None,
) -> None:
    """Trains a classifier, in place, on pseudo-features of the classes seen so far.

    Outputs of unseen classes are not in the loss, and their weights stay unchanged. All classes
    weigh the same, also one with statistics of several tasks.

    :param head: the classifier.
    :param pseudo_features: source of the features.
    :param epochs: number of steps; each draws new features.
    :param n_per_class: number of features per class and step.
    :param learning_rate: learning rate of Adam, annealed to 0 along a cosine.
    :param generator: source of randomness, on the CPU.
    :param temperature: τ of the logit normalisation of SLCA: the loss compares ``l / (τ |l|)`` for
        the logits l of a feature. None: the logits themselves.
    """
    seen, rows = pseudo_features.labels.unique(return_inverse=True)
    weight = at_least_float32(head.weight.detach()[seen]).requires_grad_()
    bias = at_least_float32(head.bias.detach()[seen]).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    targets = rows.repeat_interleave(n_per_class)
    weights = rows.bincount().to(weight.dtype).reciprocal()  # (n_classes_seen,)
    with torch.enable_grad():
        for _ in range(epochs):
            features, _ = pseudo_features.draw(n_per_class, generator)
            logits = features @ weight.T + bias
            if temperature is not None:
                logits = nn.functional.normalize(logits, dim=1) / temperature
            loss = nn.functional.cross_entropy(logits, targets, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        head.weight[seen] = weight.to(head.weight.dtype)
        head.bias[seen] = bias.to(head.bias.dtype)


def feature_drift(before: Tensor, after: Tensor, ridge: float = 0.01) -> tuple[Tensor, Tensor]:
    """Returns the linear map by which training has moved the features, by ridge regression.

    The drift of past classes is estimated from that of the current images.

    :param before: features of the current images before the task, ``(n_samples, dim)``.
    :param after: features of the same images after it.
    :param ridge: share of the features' total variance that is added to every direction, which
        pulls the map towards a mere shift. A task has few images, and a free map would fit noise.
    :return: ``weight (dim, dim)`` and ``bias (dim,)`` of ``x -> x + x @ weight + bias``.
    """
    center, moved = before.mean(0), (after - before).mean(0)
    x, y = before - center, after - before - moved
    gram = x.T @ x
    # Nearly equal images differ by rounding errors alone, which the map must not fit either.
    limits = torch.finfo(gram.dtype)
    rounding = limits.eps * len(x) * center.square().sum() + limits.tiny
    gram.diagonal().add_(ridge * gram.diagonal().sum() + rounding)
    weight = torch.linalg.solve(gram, x.T @ y)
    return weight, moved - center @ weight

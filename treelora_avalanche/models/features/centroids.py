"""Class statistics as a few centroids, those of HiDe (Wang et al., NeurIPS 2023).

An alternative to ``gaussians``, for classes whose features form several clusters. Tensor in, tensor
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# At the top, not in the function: its import moves Python's global random state.
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from treelora_avalanche.models.features.gaussians import load_statistics


class ClassCentroids(NamedTuple):
    """Class as a mixture of Gaussians with diagonal covariance, one for each centroid.

    Mean and variance of every coordinate are those of the class. Stores ``n * (2 * dim + 1)``
    values::

        statistics = ClassCentroids.of(label=3, task=0, features=features, n_centroids=10)

    :param label: the class.
    :param task: number of the task, in the order of training.
    :param means: the centroids, ``(n, dim)``.
    :param variances: variances of the features around their centroid, ``(n, dim)``; 0 for a single
        sample.
    :param shares: share of the class's samples at each centroid, ``(n,)``.
    """

    label: int
    task: int
    means: Tensor
    variances: Tensor
    shares: Tensor

    @classmethod
    def of(cls, label: int, task: int, features: Tensor, n_centroids: int) -> ClassCentroids:
        """Returns the centroids of a class, by k-means.

        :param label: the class.
        :param task: number of the task.
        :param features: all features of the class in this task, ``(n_samples, dim)``.
        :param n_centroids: number of centroids; fewer where there are fewer different samples.
        """
        points = features.detach().cpu().double().numpy()
        n = min(n_centroids, len(features.unique(dim=0)))
        # A fixed seed, so that the global generators are neither read nor moved.
        found = KMeans(n, n_init=1, random_state=0).fit(points)
        owner = torch.as_tensor(found.labels_, dtype=torch.long, device=features.device)
        belongs = F.one_hot(owner, n).to(features)  # (n_samples, n)
        count = belongs.sum(0)
        means = belongs.T @ features / count[:, None]
        variances = belongs.T @ (features - means[owner]).square() / count[:, None]
        return cls(label, task, means, variances, count / len(features))

    @property
    def dim(self) -> int:
        """Dimension of the features."""
        return self.means.shape[1]

    def moved(self, weight: Tensor, bias: Tensor) -> ClassCentroids:
        """Returns the centroids under the map ``x -> x + x @ weight + bias`` of the features."""
        map_ = weight + torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return self._replace(
            means=self.means @ map_ + bias, variances=self.variances @ map_.square()
        )


class CentroidFeatures:
    """Draws features around the centroids of classes, each as often as its share::

        features, labels = CentroidFeatures(statistics).draw(16, torch.Generator())

    :param statistics: statistics of the classes.
    """

    def __init__(self, statistics: Sequence[ClassCentroids]):
        device = statistics[0].means.device
        self.labels = torch.tensor([s.label for s in statistics], device=device)  # (n_classes,)
        n = max(len(s.means) for s in statistics)

        def padded(rows: list[Tensor]) -> Tensor:
            return torch.stack([F.pad(r, (*[0, 0] * (r.ndim - 1), 0, n - len(r))) for r in rows])

        self._means = padded([s.means for s in statistics])  # (n_classes, n, dim)
        self._deviations = padded([s.variances for s in statistics]).sqrt()
        self._shares = padded([s.shares for s in statistics]).cpu()  # (n_classes, n)

    @property
    def dim(self) -> int:
        """Dimension of the features."""
        return self._means.shape[-1]

    def draw(self, n_per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws features of every class.

        :param n_per_class: number of features per class.
        :param generator: source of randomness, on the CPU.
        :return: features ``(n_classes * n_per_class, dim)``, and their labels.
        """
        device = self._means.device
        chosen = torch.multinomial(self._shares, n_per_class, replacement=True, generator=generator)
        noise = torch.randn(*chosen.shape, self.dim, generator=generator).to(device)
        classes = torch.arange(len(chosen), device=device)[:, None]
        chosen = chosen.to(device)
        features = self._means[classes, chosen] + noise * self._deviations[classes, chosen]
        return features.flatten(0, 1), self.labels.repeat_interleave(n_per_class)


@dataclass(frozen=True)
class Centroids:
    """Centroids as the :class:`~treelora_avalanche.models.features.gaussians.StatisticsKind`::

        kind = Centroids(n_centroids=10)
        source = kind.draws(kind.of(features, targets, task=0))

    :param n_centroids: number of centroids per class; 10 in HiDe.
    :raises ValueError: if ``n_centroids`` is below 1.
    """

    n_centroids: int = 10

    def __post_init__(self) -> None:
        if self.n_centroids < 1:
            raise ValueError(f"`n_centroids` should be at least 1, but is {self.n_centroids}.")

    def of(self, features: Tensor, targets: Tensor, task: int) -> list[ClassCentroids]:
        """Returns the centroids of all classes of a task.

        :param features: ``(n_samples, dim)``.
        :param targets: their classes, ``(n_samples,)``.
        :param task: number of the task.
        """
        return [
            ClassCentroids.of(label, task, features[targets == label], self.n_centroids)
            for label in targets.unique().tolist()
        ]

    def draws(self, statistics: Sequence[ClassCentroids]) -> CentroidFeatures:
        """Returns a source of pseudo-features.

        :param statistics: statistics of the classes.
        """
        return CentroidFeatures(statistics)

    def load(self, state: list[dict[str, Any]]) -> list[ClassCentroids]:
        """Returns the statistics of a saved state.

        :param state: the classes as dictionaries of tensors and plain values.
        """
        return load_statistics(ClassCentroids, state)

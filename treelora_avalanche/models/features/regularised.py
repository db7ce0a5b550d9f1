"""Regularised discriminant analysis in closed form, from the Gaussians of classes.

Tensor in, tensor out; the hook that uses it is in ``plugins/task_adaptive_head.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from treelora_avalanche.models.features.discriminant import whitening_of
from treelora_avalanche.models.features.gaussians import ClassStatistics, stacked_factors

OWN_SHARE = 0.1
DIAGONAL_SHARE = 0.1


class RegularisedDiscriminant(NamedTuple):
    """Gaussians of one mean and one regularised covariance per class and task (RDA).

    After Friedman ("Regularized Discriminant Analysis", JASA 1989), with the covariance C_k of
    class and task k, and S the mean of all C_k::

        Σ_k = (1 - diagonal) ((1 - own) S + own C_k) + diagonal diag(S)

    All classes have the same prior, and so have the tasks of a class c:
    ``p(x | c) = mean_k N(x; m_k, Σ_k)``. C_k is given as a factor, ``C_k = F_k^T F_k``. With
    ``W W^T = B^-1`` for the part B that all Σ_k share, and ``a = own (1 - diagonal)``::

        Σ_k^-1 = W (I - P_k^T P_k) W^T,  P_k = √a L_k^-1 F_k W,  L_k L_k^T = I + a F_k W W^T F_k^T

    A fit thus costs one factorisation ``(dim, dim)`` and, in one batch, those ``(rank, rank)`` of
    all k. It holds as many values as the statistics; :meth:`log_probabilities` has
    ``batch * n_gaussians * rank`` intermediate ones. Example::

        fitted = RegularisedDiscriminant.fit(Gaussians().of(features, targets, task=0))
        fitted.classes[fitted.log_probabilities(features).argmax(1)]

    :param classes: the classes, ascending, ``(n_classes,)``.
    :param of_class: indices of the Gaussians of each class, then -1, ``(n_classes, n_tasks)``.
    :param center: mean of the means, ``(dim,)``.
    :param whitening: W, ``(dim, dim)``.
    :param means: ``W^T (m_k - center)``, ``(n_gaussians, dim)``.
    :param own: P_k, ``(n_gaussians, rank, dim)``.
    :param own_means: ``P_k W^T (m_k - center)``, ``(n_gaussians, rank)``.
    :param offsets: ``-log |L_k|`` minus the logarithm of the number of Gaussians of the class,
        ``(n_gaussians,)``.
    """

    classes: Tensor
    of_class: Tensor
    center: Tensor
    whitening: Tensor
    means: Tensor
    own: Tensor
    own_means: Tensor
    offsets: Tensor

    @classmethod
    def fit(
        cls,
        statistics: Sequence[ClassStatistics],
        own: float = OWN_SHARE,
        diagonal: float = DIAGONAL_SHARE,
    ) -> RegularisedDiscriminant:
        """Returns the discriminant of some classes; what they share is computed in float64.

        :param statistics: statistics of the classes, at least one.
        :param own: share of a class's own covariance, in [0, 1). With 0 and a single task per
            class the discriminant is linear, see :func:`linear_discriminant`.
        :param diagonal: share of the diagonal, in [0, 1].
        """
        shared = _Shared.of(statistics, own, diagonal)
        classes, index, counts = shared.labels.unique(return_inverse=True, return_counts=True)
        before = (shared.labels[:, None] == shared.labels).tril(-1).sum(1)  # of the same class
        of_class = index.new_full((len(classes), int(counts.max())), -1)
        of_class[index, before] = torch.arange(len(index), device=index.device)
        factors = stacked_factors(statistics)  # (n_gaussians, rank, dim)
        whitening = shared.whitening.to(factors)
        white = (own * (1 - diagonal)) ** 0.5 * factors @ whitening
        inner = torch.eye(white.shape[1]).to(white) + white @ white.mT
        root = torch.linalg.cholesky(inner)  # (n_gaussians, rank, rank)
        means = (shared.centered @ shared.whitening).to(factors)
        projections = torch.linalg.solve_triangular(root, white, upper=False)
        return cls(
            classes,
            of_class,
            shared.center.to(factors),
            whitening,
            means,
            projections,
            (projections @ means[:, :, None])[:, :, 0],
            -root.diagonal(dim1=1, dim2=2).log().sum(1) - counts[index].to(root).log(),
        )

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Returns the logarithms of the probabilities of the classes, ``(batch, n_classes)``.

        :param features: ``(batch, dim)``.
        """
        white = (features.to(self.center) - self.center) @ self.whitening
        apart = torch.cdist(white, self.means, compute_mode="donot_use_mm_for_euclid_dist")
        along = (white @ self.own.flatten(0, 1).T).unflatten(1, self.own.shape[:2])
        along = along - self.own_means  # P_k W^T (x - m_k)
        density = self.offsets - 0.5 * (apart.square() - along.square().sum(2))
        density = nn.functional.pad(density, (0, 1), value=float("-inf"))  # at index -1
        return density[:, self.of_class].logsumexp(2).log_softmax(1)


class _Shared(NamedTuple):
    """What all Gaussians share, in float64; see :class:`RegularisedDiscriminant`."""

    labels: Tensor
    center: Tensor
    centered: Tensor  # m_k - center, (n_gaussians, dim)
    whitening: Tensor

    @classmethod
    def of(cls, statistics: Sequence[ClassStatistics], own: float, diagonal: float) -> _Shared:
        means = torch.stack([s.mean for s in statistics]).double()
        factors = torch.cat([s.factor for s in statistics]).double()
        varied = sum(len(s.factor) > 0 for s in statistics)  # not classes of a single sample
        covariance = factors.T @ factors / max(1, varied)
        variances = covariance.diagonal()
        # A constant coordinate, or a single sample per class, has a variance too.
        variances = variances.clamp(min=max(1e-6 * float(variances.mean()), 1e-12))
        base = (1 - diagonal) * (1 - own) * covariance + torch.diag(diagonal * variances)
        labels = torch.tensor([s.label for s in statistics], device=means.device)
        center = means.mean(0)
        return cls(labels, center, means - center, whitening_of(torch.linalg.cholesky(base)))


def linear_discriminant(
    statistics: Sequence[ClassStatistics], diagonal: float = DIAGONAL_SHARE
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns linear discriminant analysis (LDA), the case ``own = 0``, as weights of a classifier.

    A class with statistics of several tasks has the mean of their means. Example::

        classes, weight, bias = linear_discriminant(statistics)
        logits = features @ weight.T + bias

    :param statistics: statistics of the classes, at least one.
    :param diagonal: see :meth:`RegularisedDiscriminant.fit`.
    :return: the classes, ascending, their weights ``(n_classes, dim)`` and biases; in float64.
    """
    shared = _Shared.of(statistics, 0.0, diagonal)
    classes, index, counts = shared.labels.unique(return_inverse=True, return_counts=True)
    means = shared.centered.new_zeros(len(classes), shared.centered.shape[1])
    means = means.index_add(0, index, shared.centered) / counts[:, None]
    white = means @ shared.whitening
    weight = white @ shared.whitening.T
    return classes, weight, -weight @ shared.center - 0.5 * white.square().sum(1)


def set_linear(
    head: nn.Linear, statistics: Sequence[ClassStatistics], diagonal: float = DIAGONAL_SHARE
) -> None:
    """Sets a classifier, in place, to :func:`linear_discriminant`; unseen classes keep their rows.

    :param head: the classifier.
    :param statistics: statistics of the classes.
    :param diagonal: see :meth:`RegularisedDiscriminant.fit`.
    """
    classes, weight, bias = linear_discriminant(statistics, diagonal)
    with torch.no_grad():
        head.weight[classes] = weight.to(head.weight)
        head.bias[classes] = bias.to(head.bias)

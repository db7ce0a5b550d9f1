"""Linear discriminant analysis in closed form, with a distance that tells foreign samples.

Tensor in, tensor out; the hooks that use it are in ``plugins/prompt_router.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SHRINKAGE = 0.05


class Discriminant(NamedTuple):
    """Gaussians of one mean per class and one covariance for all (LDA).

    With ``d_k(x)^2 = (x - mean_k)^T Σ^-1 (x - mean_k)`` and equal priors, the probability of class
    k is the softmax of ``-d_k(x)^2 / 2``. Σ is the pooled within-class covariance S of N samples in
    K classes, shrunk towards a multiple of the identity::

        Σ = (1 - shrinkage) S / (N - K) + shrinkage tr(S) / (N - K) / dim I

    Example::

        fitted = Discriminant.fit([features_of_task_0, features_of_task_1])
        fitted.distances(features).argmin(1)  # the task of each sample

    :param whitening: upper triangular W with ``W W^T = Σ^-1``, ``(dim, dim)``.
    :param means: whitened means ``W^T mean_k``, ``(n_classes, dim)``.
    """

    whitening: Tensor
    means: Tensor

    @classmethod
    def fit(cls, classes: Sequence[Tensor], shrinkage: float = SHRINKAGE) -> Discriminant:
        """Returns the discriminant of some classes, computed in float64.

        :param classes: the features of each class, ``(n_samples, dim)``, at least one sample.
        :param shrinkage: share of the identity in the covariance, in (0, 1].
        """
        residuals, means = _residuals(classes), _means(classes)
        degrees = max(1, len(residuals) - len(classes))
        root = _root(residuals, (1 - shrinkage) / degrees, shrinkage * _target(residuals, degrees))
        whitening = whitening_of(root)
        return cls(whitening.float(), (means @ whitening).float())

    def distances(self, features: Tensor) -> Tensor:
        """Returns the Mahalanobis distance of every sample to every class, ``(batch, n_classes)``.

        :param features: ``(batch, dim)``.
        """
        return torch.cdist(
            features.float() @ self.whitening,
            self.means,
            compute_mode="donot_use_mm_for_euclid_dist",  # exact for samples at a mean
        )


def whitening_of(root: Tensor) -> Tensor:
    """Returns the upper triangular W with ``W W^T = Σ^-1``.

    :param root: lower triangular Cholesky factor of Σ, ``(dim, dim)``.
    """
    return torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False).T


def leave_one_out_distances(classes: Sequence[Tensor], shrinkage: float = SHRINKAGE) -> Tensor:
    """Returns the distance of every sample to every class, had it not been in the fit.

    In-sample distances are far too small where there are fewer samples than dimensions. Leaving out
    sample i of class k, with residual r = x - mean_k and c = n_k / (n_k - 1), gives the residual
    c r and the scatter ``S - c r r^T``; the inverse follows by Sherman and Morrison, so that all
    samples together cost one factorisation. The target of the shrinkage is kept. Example::

        distances = leave_one_out_distances([of_task_0, of_task_1])
        threshold = distances.amin(1).quantile(0.99)

    :param classes: the features of each class, ``(n_samples, dim)``.
    :param shrinkage: see :class:`Discriminant`.
    :return: ``(n_samples of all classes, n_classes)``; infinite where the own class has no other
        sample.
    """
    residuals, n_classes = _residuals(classes), len(classes)
    degrees = max(1, len(residuals) - n_classes)
    # Σ without sample i is share * (S - c r r^T) + shrinkage * target * I.
    share = (1 - shrinkage) / max(1, degrees - 1)
    root = _root(residuals, share, shrinkage * _target(residuals, degrees))
    means = _means(classes)
    sizes = torch.tensor([len(features) for features in classes], device=means.device)
    own = torch.arange(n_classes, device=means.device).repeat_interleave(sizes)  # (n,)
    factor = (sizes / (sizes - 1).clamp(min=1))[own].double()  # c, (n,)

    def whitened(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root, rows.T, upper=False).T

    white, white_means = whitened(residuals), whitened(means)  # (n, dim), (n_classes, dim)
    energy = white.square().sum(1)  # r^T P^-1 r
    correction = share * factor / (1 - share * factor * energy)  # (n,)
    columns = []
    for k, mean in enumerate(white_means):
        apart = white + white_means[own] - mean  # x - mean_k, whitened
        apart = torch.where((own == k)[:, None], white * factor[:, None], apart)
        along = (apart * white).sum(1)
        columns.append(apart.square().sum(1) + correction * along.square())
    distances = torch.stack(columns, 1).clamp(min=0).sqrt()
    alone = sizes[own] == 1
    distances[alone, own[alone]] = torch.inf
    return distances.float()


def _residuals(classes: Sequence[Tensor]) -> Tensor:
    return torch.cat([features.double() - features.double().mean(0) for features in classes])


def _means(classes: Sequence[Tensor]) -> Tensor:
    return torch.stack([features.double().mean(0) for features in classes])


def _target(residuals: Tensor, degrees: int) -> Tensor:
    """Mean variance of a coordinate; above 0, so that equal samples have a covariance too."""
    return (residuals.square().sum() / degrees / residuals.shape[1]).clamp(min=1e-12)


def _root(residuals: Tensor, share: float, floor: Tensor) -> Tensor:
    """Cholesky factor of ``share S + floor I``, with S the scatter of the residuals."""
    scatter = residuals.T @ residuals
    return torch.linalg.cholesky(share * scatter + floor * torch.eye(len(scatter)).to(scatter))

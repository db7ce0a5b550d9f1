"""Ridge regression on randomly projected features, in closed form.

Tensor in, tensor out; the hooks that use it are in ``plugins/baselines/ran_pac.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters.classifier import classifier_of

STRENGTHS = torch.logspace(-8, 8, 17, dtype=torch.float64)
"""Strengths λ of the ridge to choose from, those of RanPAC."""

HELD_OUT = 5
"""One sample in this many is held out to choose λ."""


class RandomProjectionClassifier(nn.Linear):
    """Linear classifier next to a ridge classifier on a random projection of the same features.

    With features f ``(dim,)`` and a fixed projection P ``(dim, n_projections)`` of standard normal
    values, the logits are ``A f + b + W relu(P^T f)``. W is zero until it is fitted, and A is zero
    from then on::

        head = RandomProjectionClassifier(vit.head, n_projections=2000, seed=0)
        head.fit(weight, seen=torch.tensor([0, 1]))  # weight (n_classes, n_projections)

    :param linear: the linear classifier that it replaces, whose parameters it takes.
    :param n_projections: number of projections.
    :param seed: seed of the projections.
    """

    projection: Tensor
    ridge: Tensor

    def __init__(self, linear: nn.Linear, n_projections: int, seed: int):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        zeros = linear.weight.detach().new_zeros(linear.out_features)
        self.weight = linear.weight
        self.bias = nn.Parameter(zeros) if linear.bias is None else linear.bias
        device, generator = linear.weight.device, torch.Generator().manual_seed(seed)
        projection = torch.randn(linear.in_features, n_projections, generator=generator)
        self.register_buffer("projection", projection.to(device))
        self.register_buffer("ridge", torch.zeros(linear.out_features, n_projections).to(device))

    def forward(self, features: Tensor) -> Tensor:
        # The ridge has large weights of both signs, whose sums need float32.
        with torch.autocast(features.device.type, enabled=False):
            of_ridge = self.project(features) @ self.ridge.T
        return super().forward(features) + of_ridge

    def project(self, features: Tensor) -> Tensor:
        """Returns the projected features, ``(batch, n_projections)``.

        :param features: ``(batch, dim)``.
        """
        return (features.to(self.projection.dtype) @ self.projection).relu()

    @torch.no_grad()
    def fit(self, weight: Tensor, seen: Tensor) -> None:
        """Sets the ridge classifier in place of the linear one; unseen classes get no probability.

        :param weight: ``(n_classes, n_projections)``.
        :param seen: labels of the classes seen so far.
        """
        self.ridge = weight.to(self.ridge)  # not in place: copies of a view share buffers
        self.weight.zero_()
        self.bias.fill_(float("-inf"))
        self.bias[seen] = 0.0


def project_classifier(model: nn.Module, n_projections: int, seed: int) -> None:
    """Replaces the linear classifier of a model by a :class:`RandomProjectionClassifier`, in place.

    :param model: a model with a linear classifier, plain or with LoRA.
    :param n_projections: number of projections.
    :param seed: seed of the projections.
    :raises ValueError: if the model has no linear classifier; it is then unchanged.
    """
    linear = classifier_of(model)
    name = next(name for name, module in model.named_modules() if module is linear)
    model.set_submodule(name, RandomProjectionClassifier(linear, n_projections, seed))


def check_projections(n_projections: int) -> None:
    """Raises an error for a number of projections below 1.

    :param n_projections: number of projections.
    :raises ValueError: if it is out of range.
    """
    if n_projections < 1:
        raise ValueError(
            f"`n_projections` should be at least 1, but is {n_projections}. The paper's is 10000."
        )


def ridge_weight(gram: Tensor, sums: Tensor, strength: float) -> Tensor:
    """Returns ``W = ((G + λ I)^-1 C)^T``, ``(n_classes, dim)``, computed in float64.

    :param gram: Gram matrix G, the sum of ``h h^T`` over samples h, ``(dim, dim)``.
    :param sums: C, whose columns are the sums of each class's samples, ``(dim, n_classes)``.
    :param strength: λ, at least :func:`least_strength`.
    """
    regularised = gram.double()
    regularised.diagonal().add_(strength)
    weight = torch.cholesky_solve(sums.double(), torch.linalg.cholesky(regularised))
    return weight.T.to(gram.dtype)


def least_strength(gram: Tensor) -> float:
    """Returns the λ that exceeds the rounding errors of a Gram matrix, ``eps tr(G)``.

    :param gram: Gram matrix, ``(dim, dim)``.
    """
    return float(torch.finfo(gram.dtype).eps * gram.diagonal().sum())


def choose_strength(samples: Tensor, targets: Tensor, generator: torch.Generator) -> float | None:
    """Returns the λ of :data:`STRENGTHS` with the least squared error on held-out samples.

    A fifth of the samples, drawn at random, is held out. The classifiers of the others, with all
    λ, come from one eigendecomposition of the smaller of their Gram matrices, ``H H^T`` or
    ``H^T H``.

    :param samples: projected features H of one task, ``(n_samples, dim)``.
    :param targets: their classes, ``(n_samples,)``.
    :param generator: source of the draw, on the CPU.
    :return: None for fewer than two samples.
    """
    if len(samples) < 2:
        return None
    order = torch.randperm(len(samples), generator=generator).to(samples.device)
    n_held = max(1, len(samples) // HELD_OUT)
    h, held = samples.double()[order].tensor_split([len(samples) - n_held])
    one_hot = nn.functional.one_hot(targets.unique(return_inverse=True)[1][order]).to(h)
    y, expected = one_hot.tensor_split([len(samples) - n_held])
    if len(h) < h.shape[1]:  # H^T (H H^T + λ I)^-1 Y, equal to (H^T H + λ I)^-1 H^T Y
        values, vectors = torch.linalg.eigh(h @ h.T)
        left, right = held @ h.T @ vectors, vectors.T @ y
    else:
        values, vectors = torch.linalg.eigh(h.T @ h)
        left, right = held @ vectors, vectors.T @ (h.T @ y)
    errors = torch.stack(
        [
            (left / (values.clamp(min=0) + strength) @ right - expected).square().mean()
            for strength in STRENGTHS.tolist()
        ]
    )
    return float(STRENGTHS[int(errors.argmin())])

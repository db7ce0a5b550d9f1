"""Halves a group of tasks: the threshold δ of Eq. 1, principal direction, closest pair.

Tensor in, tensor out; :class:`~treelora_avalanche.tree.AdapterTree` calls these functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPLITS = ("principal", "median_l1")
"""How a group may be halved."""

_POWER_ITERATIONS = 16


def threshold(group: Tensor) -> float:
    """Returns the threshold δ of a group (Eq. 1), ``median_k ‖g_k − mean(g)‖_1``.

    The median of an even number of distances is the mean of the middle two.

    :param group: ``(n_members, dim)``, the members' signatures at the layer of their node.
    """
    group = group.double()
    distances = torch.linalg.vector_norm(group - group.mean(0), ord=1, dim=1).sort().values
    n = len(distances)
    return float((distances[(n - 1) // 2] + distances[n // 2]) / 2)


def principal_direction(centred: Tensor) -> Tensor:
    """Returns the principal direction of a group X, by power iteration ``v <- XᵀX v / ‖XᵀX v‖``.

    The iteration starts from the member farthest from the mean, so the result does not depend on
    the order of the members. The largest component, the first of several equal ones, is positive.
    No matrix of size (dim, dim) or (n_members, n_members) is formed.

    :param centred: ``(n_members, dim)``, the members' signatures less their mean.
    :return: ``(dim,)``, of length 1; all zero if the members are identical.
    """
    start = centred[torch.linalg.vector_norm(centred, dim=1).argmax()]
    direction = torch.nn.functional.normalize(start, dim=0)
    if len(centred) > 2:  # the difference of two is their principal direction already
        for _ in range(_POWER_ITERATIONS):
            direction = torch.nn.functional.normalize(centred.T @ (centred @ direction), dim=0)
    size = direction.abs()
    first_of_largest = (size >= (1 - 1e-6) * size.max()).int().argmax()  # equal up to rounding
    sign: Tensor = direction[first_of_largest].sign()
    return direction * sign


def closest_pair(signatures: Tensor) -> tuple[int, int]:
    """Returns the two adapters with the smallest L1 distance, summed over layers.

    :param signatures: ``(n_adapters, n_layers, dim)``, of at least two adapters.
    :return: the smaller index, then the larger; of equally close pairs the first.
    """
    flat = signatures.flatten(1)
    distances = torch.cdist(flat, flat, p=1)  # (n_adapters, n_adapters)
    above_diagonal = torch.ones_like(distances, dtype=torch.bool).triu(1)
    first = int(torch.where(above_diagonal, distances, math.inf).argmin())
    return divmod(first, len(flat))


def split_key(group: Tensor, split: str) -> Tensor:
    """Returns the key by which a group is split; the smaller half becomes the left child.

    :param group: ``(n_members, dim)``, the members' signatures at the layer of their node.
    :param split: one of :data:`SPLITS`.
    :return: ``(n_members,)``.
    """
    centred = group - group.mean(0)
    if split == "median_l1":
        distances: Tensor = torch.linalg.vector_norm(centred, ord=1, dim=1)
        return distances
    return torch.mv(centred, principal_direction(centred))

"""Orthonormal bases of the subspaces of past tasks, and projections off them.

Tensor in, tensor out; the hooks that use it are in ``plugins/baselines``: ``ogd`` and ``inf_lora``.
A basis is a matrix of orthonormal rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treelora_avalanche.state import check_keys


def project_off(vectors: Tensor, basis: Tensor) -> Tensor:
    """Returns the part of vectors that is orthogonal to a subspace, ``v - (v U^T) U``.

    :param vectors: ``(..., dim)``.
    :param basis: basis U of the subspace, ``(n, dim)``.
    :return: tensor of the shape of ``vectors``.
    """
    return vectors - (vectors @ basis.T) @ basis


def new_directions(vectors: Tensor, basis: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Returns a basis of the directions that vectors add to a subspace, the largest first.

    :param vectors: ``(n_vectors, dim)``.
    :param basis: basis of the subspace, ``(n, dim)``.
    :param tolerance: share of the longest vector's length below which a direction is noise.
    :return: ``(at most n_vectors, dim)``, orthogonal to ``basis``.
    """
    scale = torch.linalg.vector_norm(vectors, dim=1).max()
    _, sizes, directions = torch.linalg.svd(project_off(vectors, basis), full_matrices=False)
    found = directions[sizes > tolerance * scale]
    return _orthonormal(project_off(project_off(found, basis), basis))


def _orthonormal(directions: Tensor) -> Tensor:
    """Makes nearly orthonormal rows exactly so."""
    columns: Tensor = torch.linalg.qr(directions.T).Q
    return columns.T


class SubspaceMemory:
    """Subspace of a layer's past inputs, stored as in DualGPM (Liang & Li, CVPR 2024).

    Stores a basis of the subspace or, once that is more than half of the space, of its orthogonal
    complement: at most ``dim / 2`` vectors of ``dim`` values, however many tasks::

        memory = SubspaceMemory(dim=768)
        memory.add(x.T @ x, threshold=0.95)  # x: (n_samples, 768)
        memory.remove_past(vectors)

    :param dim: number of inputs of the layer.
    """

    def __init__(self, dim: int):
        self.basis = torch.empty(0, dim)
        """Orthonormal rows, ``(n, dim)``."""
        self.is_complement = False
        """Whether the basis spans the free directions instead of the past ones."""

    @property
    def n_past(self) -> int:
        """Dimension of the subspace of the past."""
        return self.basis.shape[1] - len(self.basis) if self.is_complement else len(self.basis)

    def remove_past(self, vectors: Tensor) -> Tensor:
        """Returns the part of vectors that is orthogonal to all past inputs.

        :param vectors: ``(n_vectors, dim)``.
        :return: tensor of the same shape.
        """
        basis = self.basis.to(vectors)
        if self.is_complement:
            return (vectors @ basis.T) @ basis
        return project_off(vectors, basis)

    def free_directions(self, covariance: Tensor, n: int) -> Tensor:
        """Returns the principal directions of a task's inputs outside the past subspace.

        With H the inputs and P the projection, the leading left singular vectors of P H.

        :param covariance: sum of ``x x^T`` over the inputs x of the task, H H^T, ``(dim, dim)``.
        :param n: number of directions.
        :return: orthonormal rows, ``(n, dim)``; rows of zeros where the past leaves fewer.
        """
        energies, directions = self._principal(covariance)
        rounding = 1e-6 * covariance.trace()
        found = directions[:n][energies[:n] > rounding]
        rows = covariance.new_zeros(n, len(covariance))
        rows[: len(found)] = self._clean(found)
        return rows

    def add(self, covariance: Tensor, threshold: float) -> None:
        """Adds a task: the fewest directions that, with the past ones, hold a share of its energy.

        :param covariance: as in :meth:`free_directions`.
        :param threshold: the share, epsilon_th in the paper, below 1.
        """
        energies, directions = self._principal(covariance)
        total = covariance.trace()
        held = (total - energies.sum()) + energies.cumsum(0)  # with the first 1, 2, ... directions
        n = int((held < threshold * total).sum()) + 1
        if total - energies.sum() >= threshold * total:
            n = 0
        n = min(n, len(covariance) - self.n_past)
        self._extend(self._clean(directions[:n]))

    def _principal(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Returns energies and directions of P H, the greatest first."""
        projected = self.remove_past(self.remove_past(covariance).T)
        energies, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        return energies.flip(0).clamp(min=0), vectors.flip(1).T

    def _clean(self, directions: Tensor) -> Tensor:
        # Projected once more: the eigenvector of a direction with little energy is inexact.
        return _orthonormal(self.remove_past(self.remove_past(directions)))

    def _extend(self, past: Tensor) -> None:
        self.basis = self.basis.to(past)
        if self.is_complement:
            # The directions of the complement that are orthogonal to the new ones.
            inside, _ = torch.linalg.qr(self.basis @ past.T, mode="complete")
            self.basis = inside[:, len(past) :].T @ self.basis
        else:
            self.basis = torch.cat((self.basis, past))
            if 2 * len(self.basis) > self.basis.shape[1]:
                whole, _ = torch.linalg.qr(self.basis.T, mode="complete")
                self.basis = whole[:, len(self.basis) :].T.contiguous()
                self.is_complement = True

    def state_dict(self) -> dict[str, Any]:
        """Returns the basis, not copied, and whether it spans the complement."""
        return {"basis": self.basis, "is_complement": self.is_complement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the subspace by that of a state.

        :param state: return value of :meth:`state_dict`.
        :raises ValueError: if it is of another dimension; the memory is then unchanged.
        """
        check_keys(state, {"basis", "is_complement"}, "the state of SubspaceMemory")
        dim = self.basis.shape[1]
        if state["basis"].ndim != 2 or state["basis"].shape[1] != dim:
            raise ValueError(
                f"the basis in the state should be of shape (n, {dim}), as the layer has {dim} "
                f"inputs, but is {tuple(state['basis'].shape)}. Build the strategy with the same "
                "layers."
            )
        self.basis = state["basis"].detach().clone()
        self.is_complement = bool(state["is_complement"])

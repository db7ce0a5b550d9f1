"""Nodes of the K-D tree, and the record of a merge."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Merge(NamedTuple):
    """Two adapters merged into one; indices above ``absorbed`` decrease by one.

    >>> Merge(kept=0, absorbed=2, kept_weight=0.5)
    Merge(kept=0, absorbed=2, kept_weight=0.5)

    :param kept: index of the merged adapter.
    :param absorbed: index, before the merge, of the adapter that is removed; above ``kept``.
    :param kept_weight: share of ``kept`` in the merged adapter: n_kept / (n_kept + n_absorbed), in
        numbers of tasks.
    """

    kept: int
    absorbed: int
    kept_weight: float


@dataclass(eq=False)
class Node:
    """Group of tasks; a leaf, or an inner node with two children.

    >>> import torch
    >>> leaf = Node(level=1, members=[0, 2], total=torch.tensor([1.0, 0.5]))
    >>> leaf.mean
    tensor([0.5000, 0.2500])

    :param level: distance from the root. The members are compared and split by layer ``level``.
    :param members: indices of the adapters in this group, ascending.
    :param total: ``(dim,)``, float64: sum of the members' signatures at the layer by which the
        parent compares its two children. Empty at the root.
    :param delta: threshold δ, Eq. 1: median of the L1 distances between the members and their
        mean. NaN where an insertion has outdated it; :attr:`AdapterTree.root` recomputes it.
    :param left: first child; None in a leaf.
    :param right: second child; None in a leaf.
    """

    level: int
    members: list[int]
    total: Tensor
    delta: float = math.nan
    left: Node | None = None
    right: Node | None = None

    @property
    def children(self) -> tuple[Node, Node] | None:
        """Returns both children, or None for a leaf."""
        return None if self.left is None or self.right is None else (self.left, self.right)

    @property
    def mean(self) -> Tensor:
        """Returns the mean of the members' signatures at the layer of the parent, ``(dim,)``."""
        return self.total / len(self.members)

    def walk(self) -> Iterator[Node]:
        """Yields this node and its descendants, parents first, left before right."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            if node.children is not None:
                stack.extend(reversed(node.children))

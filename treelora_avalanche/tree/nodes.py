"""Nodes of the tree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Merge(NamedTuple):
    """Two adapters became one. Indices above ``absorbed`` are one smaller from now on.

    :param kept: index of the adapter that stands for both.
    :param absorbed: index, before the merge, of the adapter that is gone; above ``kept``.
    :param kept_weight: share of ``kept`` in the merged adapter: the number of tasks it stood
        for, divided by the number of tasks of both.
    """

    kept: int
    absorbed: int
    kept_weight: float


class FlatTree(NamedTuple):
    """The tree as tensors, which is what the bandit searches.

    Nodes ``0 .. n_adapters - 1`` are the arms: node k is adapter k. A leaf of the last level that
    holds more than two adapters has nodes beneath it that halve them without comparing them: their
    δ is infinite, so that their bound (Eq. 2) is the smaller one of their children. The search
    finds the smallest bound in such a leaf as if all its adapters were children of the one node,
    and a step is O(log n_adapters) however few levels there are.

    :param children: ``(n_nodes, 2)``, long; both of an arm are itself.
    :param delta: ``(n_nodes,)``, the threshold δ of inner nodes, 0 for arms.
    :param root: index of the root; the arm itself where there is one only.
    :param height: number of edges on the longest path from the root to an arm.
    """

    children: Tensor
    delta: Tensor
    root: int
    height: int


@dataclass(eq=False)
class Node:
    """A group of tasks.

    :param level: distance from the root. The members are compared, and split, by layer ``level``.
    :param members: indices of the adapters in this group, ascending.
    :param total: ``(dim,)``, float64: sum of the members' signatures at the layer by which the
        parent compares its two children. Empty at the root.
    :param delta: threshold δ, Eq. 1: median of the L1 distances between the members and their
        mean. Not a number while insertions have outdated it; :attr:`AdapterTree.root` renews it.
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
        """Both children, or None for a leaf."""
        return None if self.left is None or self.right is None else (self.left, self.right)

    @property
    def mean(self) -> Tensor:
        """``(dim,)``: mean of the members' signatures at the layer the parent splits by."""
        return self.total / len(self.members)

    def walk(self) -> Iterator[Node]:
        """Yields this node and all beneath it, parents first, left before right."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            if node.children is not None:
                stack.extend(reversed(node.children))

"""The tree as tensors, for the bandit search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from treelora_avalanche.tree.nodes import Node


class FlatTree(NamedTuple):
    """Tree as tensors, as :class:`~treelora_avalanche.bandit.LCBSearch` reads it.

    Nodes ``0 .. n_adapters - 1`` are the arms: node k is adapter k. A leaf of the last level with
    more than two adapters gets auxiliary nodes that halve its members without comparing them.
    Their δ is infinite, so their bound (Eq. 2) is the smaller bound of their children: the search
    finds the smallest bound in such a leaf as if all its adapters were children of one node, and a
    step is O(log n_adapters) for any number of levels.

    >>> FlatTree(torch.tensor([[0, 0], [1, 1], [0, 1]]), torch.zeros(3), root=2, height=1).root
    2

    :param children: ``(n_nodes, 2)``, long; both children of an arm are itself.
    :param delta: ``(n_nodes,)``, the threshold δ of inner nodes, 0 for arms.
    :param root: index of the root; with one adapter, that arm.
    :param height: number of edges on the longest path from the root to an arm.
    """

    children: Tensor
    delta: Tensor
    root: int
    height: int


def flatten(root: Node, n_adapters: int) -> FlatTree:
    """Returns a tree as tensors. Inner nodes are numbered after the arms, parents first.

    :param root: the root, with δ up to date.
    :param n_adapters: number of adapters in the tree.
    """
    inner = [node for node in root.walk() if len(node.members) > 1]
    n, end, height = n_adapters, n_adapters + len(inner), 0
    number = {id(node): n + i for i, node in enumerate(inner)}  # of a node object
    rows: list[Sequence[int]] = []  # children of the inner nodes
    auxiliary: list[Sequence[int]] = []  # children of the nodes that halve a leaf, from ``end`` on
    for node in inner:
        if node.children is not None:
            rows.append([number.get(id(c), c.members[0]) for c in node.children])
            height = max(height, node.level + 1)
            continue
        group = node.members
        height = max(height, node.level + (len(group) - 1).bit_length())
        while len(group) > 2:
            first = end + len(auxiliary)
            pairs = list(zip(group[::2], group[1::2], strict=False))
            auxiliary += pairs
            group = [*range(first, first + len(pairs)), *group[2 * len(pairs) :]]
        rows.append(group)
    arms = torch.arange(n)[:, None].expand(n, 2)
    children = torch.tensor([*rows, *auxiliary], dtype=torch.long).view(-1, 2)
    delta = [node.delta for node in inner] + [math.inf] * len(auxiliary)
    return FlatTree(
        torch.cat((arms, children)),
        torch.cat((torch.zeros(n), torch.tensor(delta))),
        number.get(id(root), 0),
        height,
    )

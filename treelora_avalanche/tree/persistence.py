"""Nodes as plain values and one tensor, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treelora_avalanche.tree.nodes import Node


def nodes_to_dict(root: Node | None) -> dict[str, Any]:
    """Returns the nodes as plain values that JSON can hold, and the sums that they keep.

    :param root: the root; None for an empty tree.
    :return: ``"root"``, nested lists and dictionaries, and ``"totals"``, ``(n_nodes - 1, dim)``.
    """
    totals = [] if root is None else [node.total for node in list(root.walk())[1:]]
    return {
        "root": None if root is None else _to_plain(root),
        "totals": torch.stack(totals) if totals else torch.zeros(0, 0, dtype=torch.float64),
    }


def nodes_from_dict(state: dict[str, Any], n_adapters: int, dim: int) -> Node | None:
    """Returns the root of restored nodes; None for an empty tree.

    :param state: what :func:`nodes_to_dict` returned.
    :param n_adapters: number of adapters in the tree.
    :param dim: size of a signature.
    :raises ValueError: if the leaves or the sums do not fit the adapters.
    """
    root = None
    nodes: list[Node] = []
    if n_adapters:
        root = _from_plain(state["root"], level=0)
        if root.members != list(range(n_adapters)):
            raise ValueError(
                f'The leaves of `state["root"]` should hold each of the {n_adapters} adapters '
                f"once, but hold {root.members}."
            )
        nodes = list(root.walk())[1:]
    totals: Tensor = state["totals"].detach().to("cpu", torch.float64, copy=True)
    if len(totals) != len(nodes) or (nodes and totals.shape[1:] != (dim,)):
        raise ValueError(
            f'`state["totals"]` should have the shape ({len(nodes)}, {dim}), one row per node '
            f"below the root, but has the shape {tuple(totals.shape)}."
        )
    for node, total in zip(nodes, totals.unbind(0), strict=True):
        node.total = total.clone()
    return root


def _to_plain(node: Node) -> Any:
    """Returns a leaf as the list of its members, an inner node as a dictionary of its children."""
    if node.children is None:
        return list(node.members)
    left, right = node.children
    return {"left": _to_plain(left), "right": _to_plain(right)}


def _from_plain(plain: Any, level: int) -> Node:
    """Returns the node that :func:`_to_plain` wrote, with its descendants and without sums."""
    left = right = None
    if isinstance(plain, dict):
        left, right = (_from_plain(plain[side], level + 1) for side in ("left", "right"))
        members = sorted(left.members + right.members)
    else:
        members = list(plain)
    return Node(level, members, torch.zeros(0), left=left, right=right)

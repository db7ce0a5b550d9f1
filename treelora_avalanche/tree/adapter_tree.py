"""K-D tree of task adapters: which past tasks resemble each other, and at which layers.

Section 3.1 of `TreeLoRA <https://arxiv.org/abs/2506.10355>`_ (Qian et al., ICML 2025). Past tasks
are the leaves of a binary tree. A node at level d groups tasks by the signatures of layer d, the
direction in which training moved the adapter of that layer. Tasks that separate near the root
differ from the first layers on; tasks that separate late share them. A tree of ``depth`` levels
splits by ``depth`` layers in turn and has at most ``2 ** depth`` leaves::

    level 0      {0 1 2 3}        split by layer 0
                ┌────┴────┐
    level 1   {0 2}     {1 3}     split by layer 1
              ┌─┴─┐     ┌─┴─┐
    level 2   0   2     1   3     adapters, the arms of the search

Choices where the paper is open, and departures from it:

* A node's threshold δ is the median of the L1 distances from its members to their mean (Eq. 1).
  The paper also splits the members at δ, which puts a ball of tasks into one child and the shell
  around it, with tasks on opposite sides, into the other. Here they are split at the median along
  their principal direction. Mean diameter of nodes relative to the root, at depth 1 to 4
  (64 tasks): 0.96 0.86 0.68 0.53 with the paper's split, 0.73 0.53 0.37 0.24 with this one.
  ``split="median_l1"`` is the paper's.
* A level splits its members into halves of equal size (the left one gets the odd member), so a
  newly built tree is balanced. Insertions may unbalance it: a subtree that gets twice as deep, or
  a last leaf that gets twice as large, as balance allows is rebuilt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treelora_avalanche.choices import check_known
from treelora_avalanche.tree.drawing import draw
from treelora_avalanche.tree.flat import FlatTree, flatten
from treelora_avalanche.tree.nodes import Merge, Node
from treelora_avalanche.tree.persistence import nodes_from_dict, nodes_to_dict
from treelora_avalanche.tree.splits import SPLITS, closest_pair, split_key, threshold

if TYPE_CHECKING:
    import rich.tree

MAX_DEPTH = 64
"""Largest default depth: that of the largest tree in the paper (LLaMA-2-7B)."""

_FORMAT_VERSION = 2


class AdapterTree:
    """K-D tree over the signatures of the stored adapters (Section 3.1).

    >>> tree = AdapterTree(depth=2)
    >>> for signature in ([1.0, 0.0], [0.9, 0.1], [0.0, 1.0]):
    ...     merges = tree.insert(torch.tensor([signature, signature]))  # (n_layers, dim) = (2, 2)
    >>> [leaf.members for leaf in tree.root.walk() if leaf.children is None]
    [[2], [1], [0]]

    Signatures are stored on the CPU in float32.

    :param depth: number of levels that split, from 1 to the number of layers. Default: the number
        of layers of the first signature, at most 64.
    :param max_adapters: storage budget. Where a new task would exceed it, the two closest adapters
        are merged. Default: no limit.
    :param split: how a group is halved: ``"principal"``, along the principal direction of the
        centred signatures, or ``"median_l1"``, by the distance to the mean as in the paper.
    :raises ValueError: if ``depth`` or ``max_adapters`` is below 1, or ``split`` is unknown.
    """

    tasks: list[list[int]]
    """Tasks of each adapter, in order of arrival."""

    n_tasks: int
    """Number of tasks inserted so far."""

    def __init__(
        self,
        depth: int | None = None,
        *,
        max_adapters: int | None = None,
        split: str = "principal",
    ) -> None:
        if depth is not None and depth < 1:
            raise ValueError(
                f"`depth` should be at least 1, but is {depth}. Leave it out to "
                "use one level for each adapted layer."
            )
        if max_adapters is not None and max_adapters < 1:
            raise ValueError(
                f"`max_adapters` should be at least 1, but is {max_adapters}. "
                "Use None to keep the adapter of every task."
            )
        check_known("`split`", split, SPLITS)
        self.depth = depth
        self.max_adapters = max_adapters
        self.split = split
        self._given_depth = depth
        self.tasks = []
        self.n_tasks = 0
        self._root: Node | None = None
        self._storage = torch.empty(0, 0, 0)  # (capacity, n_layers, dim), the first len(self) used

    def __len__(self) -> int:
        """Returns the number of adapters, the arms of the search."""
        return len(self.tasks)

    @property
    def adapter_of_task(self) -> dict[int, int]:
        """Returns the index of the adapter of each task; tasks are numbered in order of arrival."""
        return {task: adapter for adapter, tasks in enumerate(self.tasks) for task in tasks}

    @property
    def signatures(self) -> Tensor:
        """Returns the signatures, ``(n_adapters, n_layers, dim)``: a view, to be read only."""
        return self._storage[: len(self)]

    @property
    def root(self) -> Node:
        """Returns the root, with δ up to date in the whole tree.

        :raises ValueError: if the tree is empty.
        """
        if self._root is None:
            raise ValueError("The tree is empty. Call `insert` with the signature of a task first.")
        self._update_deltas(self._root)
        return self._root

    # Growing

    def insert(self, signature: Tensor) -> list[Merge]:
        """Inserts the next task.

        The task descends to the nearest leaf, by L1 distance to the means of the children; a leaf
        that then holds two tasks is split while levels remain. Where the number of adapters
        exceeds ``max_adapters``, the closest two are merged and the tree is rebuilt.

        :param signature: ``(n_layers, dim)``, floating point, on any device: the direction of the
            task's update, divided for each layer by its L1 norm.
        :return: the merges made to stay within ``max_adapters``, in order; usually none.
        :raises TypeError: if the signature is not floating point.
        :raises ValueError: if its shape differs from that of the stored signatures, ``depth``
            exceeds its layers, or a value is not finite. The tree is then unchanged.
        """
        signature = self._checked(signature)
        index = len(self)
        self._append(signature)
        merges = self._merge_to_budget()
        if merges:
            self.rebuild()
        else:
            self._descend_and_grow(index)
        return merges

    def rebuild(self) -> None:
        """Rebuilds the whole tree from the stored signatures.

        The result depends on the order of insertion only where distances tie.
        """
        if self.tasks:
            self._root = Node(0, list(range(len(self))), self._storage.new_zeros(0))
            self._grow(self._root)

    @classmethod
    def build(
        cls,
        signatures: Tensor,
        depth: int | None = None,
        *,
        max_adapters: int | None = None,
        split: str = "principal",
    ) -> AdapterTree:
        """Builds the balanced tree of many tasks at once.

        :param signatures: ``(n_tasks, n_layers, dim)``; task k is row k.
        :param depth: see the class.
        :param max_adapters: see the class.
        :param split: see the class.
        :raises ValueError: as :meth:`insert` does, or if there is no task.
        """
        tree = cls(depth, max_adapters=max_adapters, split=split)
        if signatures.ndim != 3 or len(signatures) == 0:
            raise ValueError(
                "`signatures` should have the shape (n_tasks, n_layers, dim), with at least one "
                f"task, but has the shape {tuple(signatures.shape)}."
            )
        for signature in signatures:
            tree._append(tree._checked(signature))
        tree._merge_to_budget()
        tree.rebuild()
        return tree

    def _checked(self, signature: Tensor) -> Tensor:
        """Returns a signature to insert, or raises; the first signature fixes the depth."""
        if not signature.is_floating_point():
            raise TypeError(
                f"`signature` should be floating point, but has the dtype {signature.dtype}. "
                "Convert it with `.float()`."
            )
        shape = tuple(signature.shape)
        if signature.ndim != 2 or 0 in shape:
            raise ValueError(
                f"`signature` should have the shape (n_layers, dim), but has the shape {shape}. "
                "Stack the flattened adapter of each layer as one row."
            )
        if self.tasks and shape != self._storage.shape[1:]:
            raise ValueError(
                f"`signature` should have the shape {tuple(self._storage.shape[1:])} of the past "
                f"tasks, but has the shape {shape}. Use the same adapted layers and the same "
                "sketch for all tasks."
            )
        if self.depth is not None and self.depth > shape[0]:
            raise ValueError(
                f"`depth` should be at most {shape[0]}, the number of layers of `signature`, but "
                f"is {self.depth}. Lower `depth`, or adapt more layers."
            )
        signature = signature.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(signature).all()):
            n_bad = int((~torch.isfinite(signature)).sum())
            raise ValueError(
                f"`signature` should be finite, but {n_bad} of its {signature.numel()} values are "
                "not. Check that the training of this task did not diverge."
            )
        if self.depth is None:
            self.depth = min(shape[0], MAX_DEPTH)
        return signature

    def _append(self, signature: Tensor) -> None:
        """Stores a signature; capacity doubles, so that n insertions copy O(n) signatures."""
        n = len(self)
        if n == len(self._storage):
            grown = torch.empty(max(4, 2 * n), *signature.shape)
            grown[:n] = self._storage.reshape(n, *signature.shape)
            self._storage = grown
        self._storage[n] = signature
        self.tasks.append([self.n_tasks])
        self.n_tasks += 1

    def _descend_and_grow(self, index: int) -> None:
        """Inserts adapter ``index`` into the nearest leaf and keeps the tree balanced."""
        if self._root is None:
            self.rebuild()
            return
        signature = self._storage[index].double()
        node, path = self._root, [self._root]
        node.members.append(index)
        node.delta = math.nan
        while node.children is not None:
            layer = node.level
            left, right = node.children
            to_left, to_right = (
                torch.linalg.vector_norm(child.mean - signature[layer], ord=1).item()
                for child in (left, right)
            )
            node = left if to_left <= to_right else right
            path.append(node)
            node.members.append(index)
            node.total += signature[layer]
            node.delta = math.nan
        self._grow(node)  # a leaf above the last level has two members now
        for level, ancestor in enumerate(path):
            # The path is one edge longer where its leaf has been split.
            edges = len(path) - 1 - level + (node.children is not None)
            if self._out_of_balance(ancestor, edges, leaf_size=len(node.members)):
                self._grow(ancestor)
                break

    def _out_of_balance(self, node: Node, edges: int, leaf_size: int) -> bool:
        """Returns whether the path below ``node`` is twice as deep as in a balanced tree, or its
        leaf twice as large."""
        assert self.depth is not None
        n = len(node.members)
        halvings = self.depth - node.level
        return edges > 2 * math.ceil(math.log2(n)) or (
            node.level + edges == self.depth and leaf_size > 2 * math.ceil(n / 2**halvings)
        )

    def _grow(self, node: Node) -> None:
        """Builds the subtree of ``node`` from its members."""
        assert self.depth is not None
        node.left = node.right = None
        if len(node.members) == 1 or node.level >= self.depth:
            return
        group = self._storage[node.members, node.level].double()  # (n_members, dim)
        order = torch.argsort(split_key(group, self.split), stable=True)
        middle = (len(node.members) + 1) // 2
        halves = []
        for rows in (order[:middle].sort().values, order[middle:].sort().values):
            members = [node.members[row] for row in rows.tolist()]
            halves.append(Node(node.level + 1, members, group[rows].sum(0)))
            self._grow(halves[-1])
        node.left, node.right = halves

    def _update_deltas(self, root: Node) -> None:
        """Recomputes δ of the nodes that insertions have outdated.

        An insertion outdates a whole path from the root, so the search stops at valid nodes.
        """
        n_layers = self._storage.shape[1]
        outdated = [root]
        while outdated:
            node = outdated.pop()
            if not math.isnan(node.delta):
                continue
            # A leaf below the last layer is compared by that layer.
            layer = min(node.level, n_layers - 1)
            node.delta = threshold(self._storage[node.members, layer])
            outdated.extend(node.children or ())

    # Merging

    def _merge_to_budget(self) -> list[Merge]:
        """Merges the closest two adapters until at most ``max_adapters`` remain."""
        merges: list[Merge] = []
        while self.max_adapters is not None and len(self) > self.max_adapters:
            kept, absorbed = closest_pair(self.signatures)
            n_kept, n_absorbed = len(self.tasks[kept]), len(self.tasks[absorbed])
            weight = n_kept / (n_kept + n_absorbed)
            merged = torch.lerp(self._storage[absorbed], self._storage[kept], weight)
            norm = merged.abs().sum(-1, keepdim=True)
            self._storage[kept] = torch.where(norm > 0, merged / norm, 0.0)
            last = len(self) - 1
            self._storage[absorbed:last] = self._storage[absorbed + 1 : last + 1].clone()
            self.tasks[kept] = sorted(self.tasks[kept] + self.tasks.pop(absorbed))
            merges.append(Merge(kept, absorbed, weight))
        return merges

    # Other forms of the tree

    def flatten(self) -> FlatTree:
        """Returns the tree as tensors, for the bandit search.

        :raises ValueError: if the tree is empty.
        """
        return flatten(self.root, len(self))

    def __str__(self) -> str:
        """Returns :meth:`draw` as plain text, ``"empty tree"`` before the first task."""
        from rich.console import Console

        if not self.tasks:
            return "empty tree"
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.draw())
        return capture.get().rstrip("\n")

    def draw(self, names: Sequence[str] | None = None) -> rich.tree.Tree:
        """Returns the tree for ``rich.print``: level and δ of each node, tasks of each leaf.

        :param names: names of the tasks; by default only their numbers are shown.
        :raises ValueError: if the tree is empty.
        """
        return draw(self.root, self.tasks, names)

    def to_dict(self) -> dict[str, Any]:
        """Returns the tree as plain values that JSON can hold, and two tensors.

        ``"signatures"`` are those of the adapters. ``"totals"``, ``(n_nodes - 1, dim)``, are the
        sums that the nodes keep: their last bit depends on the order of insertion and may decide
        where the next task goes. :meth:`from_dict` restores exactly this tree.
        """
        return {
            "version": _FORMAT_VERSION,
            "depth": self.depth,
            "given_depth": self._given_depth,
            "max_adapters": self.max_adapters,
            "split": self.split,
            "tasks": [list(tasks) for tasks in self.tasks],
            "signatures": self.signatures.clone(),
            **nodes_to_dict(self._root),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> AdapterTree:
        """Returns the tree of a state.

        :param state: what :meth:`to_dict` returned.
        :raises ValueError: if it has another format version, or is inconsistent.
        """
        if state.get("version") != _FORMAT_VERSION:
            raise ValueError(
                f"`state` should have the version {_FORMAT_VERSION}, but has the version "
                f"{state.get('version')!r}. Read it with the release that wrote it."
            )
        expected = set(cls().to_dict())
        if set(state) != expected:
            raise ValueError(
                f"`state` should have the keys {sorted(expected)}, but has {sorted(state)}."
            )
        try:
            return cls._restored(state)
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"`state` is not a tree ({error!r}).") from error

    @classmethod
    def _restored(cls, state: dict[str, Any]) -> AdapterTree:
        tree = cls(state["given_depth"], max_adapters=state["max_adapters"], split=state["split"])
        tree.depth = state["depth"]
        tree.tasks = [list(tasks) for tasks in state["tasks"]]
        tree.n_tasks = sum(len(tasks) for tasks in tree.tasks)
        signatures = state["signatures"]
        if signatures.ndim != 3 or len(signatures) != len(tree):
            raise ValueError(
                f'`state["signatures"]` should have the shape ({len(tree)}, n_layers, dim), one '
                f"row per adapter, but has the shape {tuple(signatures.shape)}."
            )
        tree._storage = signatures.detach().to("cpu", torch.float32, copy=True)
        tree._root = nodes_from_dict(state, len(tree), signatures.shape[2])
        return tree

    def state_dict(self) -> dict[str, Any]:
        """Returns what :meth:`to_dict` returns."""
        return self.to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state in place, so that every plugin that shares this tree sees it.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it is inconsistent, or of a tree made with other arguments. The tree
            is then unchanged.
        """
        tree = AdapterTree.from_dict(state)
        given = {
            "depth": (tree._given_depth, self._given_depth),
            "max_adapters": (tree.max_adapters, self.max_adapters),
            "split": (tree.split, self.split),
        }
        for name, (saved, own) in given.items():
            if saved != own:
                raise ValueError(
                    f"`{name}` of the tree should be {saved!r}, as in the state, but is {own!r}. "
                    f"Build it with {name}={saved!r} to continue."
                )
        vars(self).update(vars(tree))

"""The K-D tree of tasks: which past tasks resemble each other, and at which layers.

Section 3.1 of `TreeLoRA <https://arxiv.org/abs/2506.10355>`_ (Qian et al., ICML 2025). Past tasks
are the leaves of a binary tree. A node at level d groups tasks by the signatures of layer d,
the direction in which training moved that layer's adapter: tasks which part near the root differ
from the first layers on, tasks which part late share them. A tree of ``depth`` levels splits by
``depth`` layers, one after the other, and has at most ``2 ** depth`` leaves.

Our reading where the paper is open, or where we depart from it:

* A node's threshold δ is the median of the L1 distances from its members to their mean (Eq. 1).
  The paper also cuts the members there, which puts a ball of tasks into one child and the shell
  around it, with tasks that lie opposite each other, into the other. We cut them in the middle
  along their principal direction. Mean diameter of nodes relative to the root, at depth 1 to 4
  (64 tasks): 0.96 0.86 0.68 0.53 with the paper's cut, 0.73 0.53 0.37 0.24 with ours.
  ``split="median_l1"`` is the paper's.
* A level splits its members into halves of equal size (the left one gets the odd member), so a
  freshly built tree is balanced. Insertions do not keep it so; a part of the tree that gets
  twice as deep, or a last leaf that gets twice as large, as balance allows is built again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treelora_avalanche.choices import check_known
from treelora_avalanche.tree.nodes import FlatTree, Merge, Node
from treelora_avalanche.tree.splits import SPLITS, closest_pair, split_key, threshold

if TYPE_CHECKING:
    import rich.tree

MAX_DEPTH = 64
"""Depth of a tree that was given none, at most: the largest one in the paper (LLaMA-2-7B)."""

_FORMAT_VERSION = 2


class AdapterTree:
    """K-D tree over the signatures of the adapters in the bank (Section 3.1).

    >>> tree = AdapterTree(depth=2)
    >>> for signature in ([1.0, 0.0], [0.9, 0.1], [0.0, 1.0]):
    ...     merges = tree.insert(torch.tensor([signature, signature]))  # (n_layers, dim) = (2, 2)
    >>> [leaf.members for leaf in tree.root.walk() if leaf.children is None]
    [[2], [1], [0]]

    All signatures are kept on the CPU in float32.

    :param depth: number of levels that split, from 1 to the number of layers. Default: the number
        of layers of the first signature, at most 64.
    :param max_adapters: storage budget. When a task would exceed it, the two closest adapters are
        merged. Default: no limit.
    :param split: how a group is halved: ``"principal"``, along the principal direction of the
        centred signatures, or ``"median_l1"``, by the distance to the mean as in the paper.
    :raises ValueError: if ``depth`` or ``max_adapters`` is below 1, or ``split`` is unknown.
    """

    tasks: list[list[int]]
    """For each adapter the tasks it stands for, in order of arrival."""

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
                f"`depth` should be at least 1 but the value passed is {depth}. Leave it out to "
                "use one level for each adapted layer."
            )
        if max_adapters is not None and max_adapters < 1:
            raise ValueError(
                f"`max_adapters` should be at least 1 but the value passed is {max_adapters}. "
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
        """Number of adapters, the arms of the search."""
        return len(self.tasks)

    @property
    def adapter_of_task(self) -> dict[int, int]:
        """For each task, by its number in order of arrival, the index of its adapter."""
        return {task: adapter for adapter, tasks in enumerate(self.tasks) for task in tasks}

    @property
    def signatures(self) -> Tensor:
        """``(n_adapters, n_layers, dim)``: the signatures, a view that is not to be written to."""
        return self._storage[: len(self)]

    @property
    def root(self) -> Node:
        """The root, with δ up to date in the whole tree.

        :raises ValueError: if the tree is empty.
        """
        if self._root is None:
            raise ValueError("The tree is empty. Call `insert` with the signature of a task first.")
        self._renew_deltas(self._root)
        return self._root

    # Growing

    def insert(self, signature: Tensor) -> list[Merge]:
        """Adds the next task.

        The task goes down to the nearest leaf, by L1 distance to the children's means; a leaf
        that holds two tasks from then on is split while levels remain. When the number of
        adapters exceeds ``max_adapters``, the closest two are merged into one and the tree is
        built again.

        :param signature: ``(n_layers, dim)``, floating point, on any device: the direction of the
            task's update, divided for each layer by its L1 norm.
        :return: the merges made to stay within ``max_adapters``, in order; mostly none.
        :raises TypeError: if the signature is not floating point.
        :raises ValueError: if its shape is not that of the signatures before, or ``depth``
            exceeds its layers, or a value is not finite. The tree is then as it was.
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
        """Builds the whole tree again from the stored signatures.

        The result depends on the order in which tasks arrived only where distances tie.
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
                f"task, but the shape passed is {tuple(signatures.shape)}."
            )
        for signature in signatures:
            tree._append(tree._checked(signature))
        tree._merge_to_budget()
        tree.rebuild()
        return tree

    def _checked(self, signature: Tensor) -> Tensor:
        """Raises for what cannot be inserted; fixes the depth at the first signature."""
        if not signature.is_floating_point():
            raise TypeError(
                f"`signature` should be floating point but its dtype is {signature.dtype}. "
                "Convert it with `.float()`."
            )
        shape = tuple(signature.shape)
        if signature.ndim != 2 or 0 in shape:
            raise ValueError(
                f"`signature` should have the shape (n_layers, dim) but the shape passed is {shape}"
                ". Stack the flattened adapter of each layer as one row."
            )
        if self.tasks and shape != self._storage.shape[1:]:
            raise ValueError(
                f"`signature` should have the shape {tuple(self._storage.shape[1:])} of the tasks "
                f"before but the shape passed is {shape}. Use the same adapted layers and the "
                "same sketch for all tasks."
            )
        if self.depth is not None and self.depth > shape[0]:
            raise ValueError(
                f"`depth` should be at most the number of layers but the value passed is "
                f"{self.depth}, and `signature` has {shape[0]} layers. Lower `depth`, or adapt "
                "more layers."
            )
        signature = signature.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(signature).all()):
            n_bad = int((~torch.isfinite(signature)).sum())
            raise ValueError(
                f"`signature` should be finite but {n_bad} of its {signature.numel()} values are "
                "not. Check that the training of this task did not diverge."
            )
        if self.depth is None:
            self.depth = min(shape[0], MAX_DEPTH)
        return signature

    def _append(self, signature: Tensor) -> None:
        """Stores the signature; capacity doubles, so that n insertions copy O(n) signatures."""
        n = len(self)
        if n == len(self._storage):
            grown = torch.empty(max(4, 2 * n), *signature.shape)
            grown[:n] = self._storage.reshape(n, *signature.shape)
            self._storage = grown
        self._storage[n] = signature
        self.tasks.append([self.n_tasks])
        self.n_tasks += 1

    def _descend_and_grow(self, index: int) -> None:
        """Puts adapter ``index`` into the nearest leaf and keeps the tree in balance."""
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
            # The path ended in a leaf, and goes one edge deeper where that leaf has been split.
            edges = len(path) - 1 - level + (node.children is not None)
            if self._out_of_balance(ancestor, edges, leaf_size=len(node.members)):
                self._grow(ancestor)
                break

    def _out_of_balance(self, node: Node, edges: int, leaf_size: int) -> bool:
        """Whether the path beneath ``node`` is twice as deep, or its end twice as large, as it
        would be in a balanced tree."""
        assert self.depth is not None
        n = len(node.members)
        halvings = self.depth - node.level
        return edges > 2 * math.ceil(math.log2(n)) or (
            node.level + edges == self.depth and leaf_size > 2 * math.ceil(n / 2**halvings)
        )

    def _grow(self, node: Node) -> None:
        """Builds everything beneath ``node`` from its members."""
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

    def _renew_deltas(self, root: Node) -> None:
        """Computes the δ of the nodes that insertions have outdated, and of those alone.

        These are closed upwards: an insertion outdates a whole path from the root.
        """
        n_layers = self._storage.shape[1]
        outdated = [root]
        while outdated:
            node = outdated.pop()
            if not math.isnan(node.delta):
                continue
            # A last-level leaf beneath the last layer is compared by that layer.
            layer = min(node.level, n_layers - 1)
            node.delta = threshold(self._storage[node.members, layer])
            outdated.extend(node.children or ())

    # Merging

    def _merge_to_budget(self) -> list[Merge]:
        """Merges the closest two adapters until there are no more than ``max_adapters``."""
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
        """The tree as tensors. Inner nodes are numbered after the arms, parents first.

        :raises ValueError: if the tree is empty.
        """
        inner = [node for node in self.root.walk() if len(node.members) > 1]
        n, end, height = len(self), len(self) + len(inner), 0
        number = {id(node): n + i for i, node in enumerate(inner)}  # of a node object
        rows: list[Sequence[int]] = []  # children of the inner nodes
        beneath: list[Sequence[int]] = []  # and of the nodes that halve a leaf, from ``end`` on
        for node in inner:
            if node.children is not None:
                rows.append([number.get(id(c), c.members[0]) for c in node.children])
                height = max(height, node.level + 1)
                continue
            group = node.members
            height = max(height, node.level + (len(group) - 1).bit_length())
            while len(group) > 2:
                first = end + len(beneath)
                pairs = list(zip(group[::2], group[1::2], strict=False))
                beneath += pairs
                group = [*range(first, first + len(pairs)), *group[2 * len(pairs) :]]
            rows.append(group)
        arms = torch.arange(n)[:, None].expand(n, 2)
        children = torch.tensor([*rows, *beneath], dtype=torch.long).view(-1, 2)
        delta = [node.delta for node in inner] + [math.inf] * len(beneath)
        return FlatTree(
            torch.cat((arms, children)),
            torch.cat((torch.zeros(n), torch.tensor(delta))),
            number.get(id(self._root), 0),
            height,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the tree as plain values that JSON can hold, and two tensors.

        ``"signatures"`` are those of the adapters; ``"totals"``, ``(n_nodes - 1, dim)``, are the
        sums that the nodes keep: their last bit depends on the order in which the tasks arrived,
        and may decide where the next task is inserted. :meth:`from_dict` restores exactly this
        tree.
        """
        nodes = [] if self._root is None else list(self._root.walk())[1:]
        totals = [node.total for node in nodes]
        return {
            "version": _FORMAT_VERSION,
            "depth": self.depth,
            "given_depth": self._given_depth,
            "max_adapters": self.max_adapters,
            "split": self.split,
            "tasks": [list(tasks) for tasks in self.tasks],
            "root": None if self._root is None else _to_plain(self._root),
            "signatures": self.signatures.clone(),
            "totals": torch.stack(totals) if totals else torch.zeros(0, 0, dtype=torch.float64),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> AdapterTree:
        """Restores a tree.

        :param state: what :meth:`to_dict` returned.
        :raises ValueError: if it was written in another format, or its parts do not fit together.
        """
        if state.get("version") != _FORMAT_VERSION:
            raise ValueError(
                f"`state` should have the version {_FORMAT_VERSION} but its version is "
                f"{state.get('version')!r}. Read it with the release that wrote it."
            )
        expected = set(cls().to_dict())
        if set(state) != expected:
            raise ValueError(
                f"`state` should have the keys {sorted(expected)} but its keys are {sorted(state)}."
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
                f"row per adapter, but its shape is {tuple(signatures.shape)}."
            )
        tree._storage = signatures.detach().to("cpu", torch.float32, copy=True)
        nodes: list[Node] = []
        if tree.tasks:
            tree._root = _from_plain(state["root"], level=0)
            if tree._root.members != list(range(len(tree))):
                raise ValueError(
                    f'The leaves of `state["root"]` should hold each of the {len(tree)} adapters '
                    f"once but they hold {tree._root.members}."
                )
            nodes = list(tree._root.walk())[1:]
        totals = state["totals"].detach().to("cpu", torch.float64, copy=True)
        if len(totals) != len(nodes) or (nodes and totals.shape[1:] != signatures.shape[2:]):
            raise ValueError(
                f'`state["totals"]` should have one row for each of {len(nodes)} nodes but its '
                f"shape is {tuple(totals.shape)}."
            )
        for node, total in zip(nodes, totals.unbind(0), strict=True):
            node.total = total.clone()
        return tree

    def state_dict(self) -> dict[str, Any]:
        """Returns what :meth:`to_dict` returns."""
        return self.to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes this very object the tree of a state, for all that share it.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if its parts do not fit together, or it is of a tree made with other
            arguments. The tree is then as it was.
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
                    f"`{name}` of the tree is {saved!r} in the state and {own!r} here. Make it "
                    f"with {name}={saved!r} to continue."
                )
        vars(self).update(vars(tree))

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
        """The tree as text, for ``rich.print``: level and δ of each node, tasks of each leaf.

        :param names: names of the tasks; by default they have their numbers alone.
        :raises ValueError: if the tree is empty.
        """
        from rich.tree import Tree

        def label(node: Node) -> str:
            n_tasks = sum(len(self.tasks[k]) for k in node.members)
            head = f"level {node.level}  δ {node.delta:.3g}  ({n_tasks} tasks)"
            if node.children is not None:
                return head
            adapters = [
                f"adapter {k}: {_tasks_in_words(self.tasks[k], names)}" for k in node.members
            ]
            if len(adapters) == 1:
                return f"level {node.level}  {adapters[0]}"
            return f"{head}  {'; '.join(adapters)}"

        def attach(branch: Tree, node: Node) -> Tree:
            for child in node.children or ():
                attach(branch.add(label(child)), child)
            return branch

        return attach(Tree(label(self.root)), self.root)


def _to_plain(node: Node) -> Any:
    """A leaf as the list of its members, an inner node as a dictionary of its children."""
    if node.children is None:
        return list(node.members)
    left, right = node.children
    return {"left": _to_plain(left), "right": _to_plain(right)}


def _from_plain(plain: Any, level: int) -> Node:
    """The node that :func:`_to_plain` wrote, and all beneath it; the sums are still missing."""
    left = right = None
    if isinstance(plain, dict):
        left, right = (_from_plain(plain[side], level + 1) for side in ("left", "right"))
        members = sorted(left.members + right.members)
    else:
        members = list(plain)
    return Node(level, members, torch.zeros(0), left=left, right=right)


def _tasks_in_words(tasks: list[int], names: Sequence[str] | None) -> str:
    words = [str(task) if names is None else f"{task} ({names[task]})" for task in tasks]
    return f"task{'s' if len(tasks) > 1 else ''} {', '.join(words)}"

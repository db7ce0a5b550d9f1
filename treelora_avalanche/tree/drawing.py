"""The tree as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from treelora_avalanche.tree.nodes import Node

if TYPE_CHECKING:
    import rich.tree


def draw(
    root: Node, tasks: Sequence[Sequence[int]], names: Sequence[str] | None = None
) -> rich.tree.Tree:
    """Returns the tree for ``rich.print``: level and δ of each node, tasks of each leaf.

    :param root: the root, with δ up to date.
    :param tasks: the tasks of each adapter.
    :param names: names of the tasks; by default only their numbers are shown.
    """
    from rich.tree import Tree

    def label(node: Node) -> str:
        n_tasks = sum(len(tasks[k]) for k in node.members)
        head = f"level {node.level}  δ {node.delta:.3g}  ({n_tasks} tasks)"
        if node.children is not None:
            return head
        adapters = [f"adapter {k}: {_in_words(tasks[k], names)}" for k in node.members]
        if len(adapters) == 1:
            return f"level {node.level}  {adapters[0]}"
        return f"{head}  {'; '.join(adapters)}"

    def attach(branch: Tree, node: Node) -> Tree:
        for child in node.children or ():
            attach(branch.add(label(child)), child)
        return branch

    return attach(Tree(label(root)), root)


def _in_words(tasks: Sequence[int], names: Sequence[str] | None) -> str:
    words = [str(task) if names is None else f"{task} ({names[task]})" for task in tasks]
    return f"task{'s' if len(tasks) > 1 else ''} {', '.join(words)}"

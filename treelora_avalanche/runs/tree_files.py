"""Files of TreeLoRA's tree in a run folder."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file

from treelora_avalanche.runs.folder import replacing, to_json, write_text


def write_tree(tree: Any, folder: Path) -> None:
    """Writes TreeLoRA's tree as ``tree.json`` and ``tree.safetensors``.

    :param tree: an :class:`~treelora_avalanche.tree.AdapterTree`.
    :param folder: the run folder.
    """
    state = tree.to_dict()
    tensors = {name: state.pop(name) for name in ("signatures", "totals")}
    with replacing(folder / "tree.safetensors") as temporary:
        save_file(tensors, temporary)
    write_text(folder / "tree.json", to_json(state))


def plain_tree(tree: Any) -> dict[str, Any]:
    """Returns a tree as nested dicts: level, δ, tasks of its adapters, and children of each node.

    :param tree: an :class:`~treelora_avalanche.tree.AdapterTree`.
    """

    def plain(node: Any) -> dict[str, Any]:
        return {
            "level": node.level,
            "delta": None if math.isnan(node.delta) else node.delta,
            "adapters": [list(tree.tasks[k]) for k in node.members],
            "children": [plain(child) for child in node.children or ()],
        }

    return plain(tree.root)


def append_drawing(tree: Any, task: int, folder: Path, names: list[str] | None) -> str:
    """Appends a drawing of a tree to ``tree.txt``.

    :param tree: an :class:`~treelora_avalanche.tree.AdapterTree`.
    :param task: index of the last task, from 0.
    :param folder: the run folder.
    :param names: names of all tasks; None if they have none.
    :return: the drawing.
    """
    text = StringIO()
    Console(file=text, width=100).print(tree.draw(names))
    with (folder / "tree.txt").open("a", encoding="utf-8") as file:
        # Tasks count from 0 as in tree.json; the figures count from 1.
        file.write(f"After {task + 1} tasks, counted from 0\n{text.getvalue()}\n")
    return text.getvalue()

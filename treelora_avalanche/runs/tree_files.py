"""TreeLoRA's tree as files of a run folder."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file

from treelora_avalanche.runs.folder import replacing, to_json, write_text


def write_tree(tree: Any, folder: Path) -> None:
    """Write TreeLoRA's tree as `tree.json` and `tree.safetensors`.

    :param tree: an `AdapterTree`.
    :param folder: the run folder.
    """
    state = tree.to_dict()
    tensors = {name: state.pop(name) for name in ("signatures", "totals")}
    with replacing(folder / "tree.safetensors") as temporary:
        save_file(tensors, temporary)
    write_text(folder / "tree.json", to_json(state))


def plain_tree(tree: Any) -> dict[str, Any]:
    """A tree for figures: of every node its level, δ and tasks, of inner nodes the children.

    :param tree: an `AdapterTree`.
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
    """Append a drawing of a tree to `tree.txt`.

    :param tree: an `AdapterTree`.
    :param task: the task that came last, counted from 0.
    :param folder: the run folder.
    :param names: of all tasks, where they have names.
    :return: the drawing.
    """
    text = StringIO()
    Console(file=text, width=100).print(tree.draw(names))
    with (folder / "tree.txt").open("a", encoding="utf-8") as file:
        # As in `tree.json`; the figures count from 1.
        file.write(f"After {task + 1} tasks, counted from 0\n{text.getvalue()}\n")
    return text.getvalue()

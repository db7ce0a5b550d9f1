"""Recipes: configurations of ``treelora compare`` for the tables of the paper (arXiv 2506.10355).

One YAML file per table; its first comment states the table and departures from it. Example::

    treelora compare --config table_05_ablation
"""

from __future__ import annotations

from pathlib import Path

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""YAML files by name, as accepted by ``treelora compare --config``."""


def describe_recipe(path: Path) -> str:
    """Returns the first line of a recipe, which states the table it reproduces.

    :param path: the YAML file.
    """
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


__all__ = ["RECIPES", "describe_recipe"]

"""Configurations of `treelora compare` for the tables of the paper (arXiv 2506.10355).

One YAML file each, whose first comment says what it reproduces and what is missing.
"""

from __future__ import annotations

from pathlib import Path

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
""" The files by their names, which `treelora compare --config` takes too. """


def describe_recipe(path: Path) -> str:
    """The first line of a recipe, which says what it reproduces.

    :param path: the YAML file.
    """
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


__all__ = ["RECIPES", "describe_recipe"]

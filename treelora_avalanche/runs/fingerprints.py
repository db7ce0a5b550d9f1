"""Fingerprints of what a configuration names but does not hold: data, weights, code."""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from treelora_avalanche.registry.methods import METHODS

SAMPLED_FILES = 512
SAMPLED_BYTES = 2**20
INPUTS = ("data", "checkpoint", "model", "plain_text")
"""Keys of a configuration that may be paths."""


def fingerprints(config: dict[str, Any], known: dict[Path, str] | None = None) -> dict[str, str]:
    """Returns a fingerprint of each input of a run, and of the code of its method.

    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    :param known: fingerprints of paths that several runs share; new ones are added.
    """
    known = {} if known is None else known
    paths = {name: Path(config[name]).expanduser() for name in INPUTS if config.get(name)}
    paths = {name: path for name, path in paths.items() if path.exists()}
    for name, value in (config.get("scenario_options") or {}).items():
        if isinstance(value, str) and os.path.isfile(os.path.expanduser(value)):
            paths[name] = Path(value).expanduser()
    for path in paths.values():
        if path not in known:
            known[path] = of_files(path)
    found = {name: known[path] for name, path in paths.items()}
    packages = {"treelora_avalanche", METHODS[config["method"]].strategy.split(".")[0]}
    code = [of_code(package) for package in sorted(packages - {"avalanche"})]
    return {**found, "code": hashlib.sha256("".join(code).encode()).hexdigest()}


def of_files(path: Path) -> str:
    """Returns the fingerprint of a file or a folder.

    It covers the names and sizes of all files, and the content of at most 512 of them, evenly
    spread: the first and last mebibyte of each.

    :param path: the file or folder.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
    for file in files[:: -(-len(files) // SAMPLED_FILES) or 1]:
        for part in _ends(file):
            digest.update(part)
    return digest.hexdigest()


def _ends(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        yield opened.read(SAMPLED_BYTES)
        if file.stat().st_size > SAMPLED_BYTES:
            opened.seek(max(SAMPLED_BYTES, file.stat().st_size - SAMPLED_BYTES))
            yield opened.read()


@cache
def of_code(package: str) -> str:
    """Returns the fingerprint of a package's code: its syntax without comments and docstrings.

    :param package: name of an installed top-level package or module.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return ""
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        digest.update(f"{file.relative_to(origin.parent)}\0{ast.dump(_bare(tree))}\0".encode())
    return digest.hexdigest()


def _bare(tree: ast.Module) -> ast.Module:
    """Removes strings that are statements, such as docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                part
                for part in body
                if not (
                    isinstance(part, ast.Expr)
                    and isinstance(part.value, ast.Constant)
                    and isinstance(part.value.value, str)
                )
            ]
    return tree


__all__ = ["fingerprints", "of_code", "of_files"]

"""A user's folder of text tasks: which tasks it holds, in which files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from treelora_avalanche.scenarios.data.names import entries
from treelora_avalanche.scenarios.data.text_files import SUFFIXES

logger = logging.getLogger(__name__)

PARTS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Names of files that are usually parts of one task."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
UNREAD = frozenset(
    (
        *(".txt", ".tsv", ".ndjson", ".xlsx", ".xls", ".ods", ".arrow", ".feather", ".zip"),
        *COMPRESSED,
    )
)
"""Suffixes of files that may hold records and are not read."""

_FORMATS = ", ".join(SUFFIXES)


def task_files(root: Path, tasks: Collection[str] | None = None) -> dict[str, list[Path]]:
    """Returns the names of tasks with their one file, or their files for training and testing.

    :param root: holds ``<task>/train.json`` with ``<task>/test.json``, or ``<task>.json``; or the
        same with another of :data:`~treelora_avalanche.scenarios.data.text_files.SUFFIXES`.
    :param tasks: names of the tasks to use; files of other folders are not checked. None for all.
    :raises FileNotFoundError: if the folder is missing.
    :raises ValueError: if there are no such tasks, if two files could be the same task, or if the
        files of a task have other names.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"`folder` should be a folder of tasks, but {str(root)!r} is not a folder."
        )
    _check_root(root)
    _warn_of_unread(root)
    found = {}
    for path in entries(root):
        if path.is_file() and path.suffix in SUFFIXES:
            found[path.stem] = [path]
        elif path.is_dir():
            parts = {part: _one_file(path, part) for part in ("train", "test")}
            if tasks is None or path.name in tasks:
                _check_parts(path, parts)
            if any(parts.values()):
                found[path.name] = [f or path / f"{part}.json" for part, f in parts.items()]
    if not found:
        raise ValueError(
            f"`folder` {str(root)!r} holds no tasks; put <task>.json or <task>.jsonl there, or "
            f"<task>/train.json with <task>/test.json. Formats are {_FORMATS}."
        )
    return found


def _check_root(root: Path) -> None:
    """Raises an error if files could be several tasks, or parts of one."""
    files = {path.name: path for path in entries(root) if path.suffix in SUFFIXES}
    names = [path.stem for path in files.values()]
    parts = [name for name in names if name in PARTS]
    if "train" in parts and len(set(parts)) > 1:
        raise ValueError(
            f"`folder` {str(root)!r} holds {', '.join(files)} itself, which would become tasks "
            f"called {', '.join(dict.fromkeys(parts))}. If they are the parts of one task, move "
            "them to a subfolder with the name of the task; the records for testing are read from "
            "test.json, or another format."
        )
    for path in files.values():
        twins = [name for name in files if name != path.name and Path(name).stem == path.stem]
        if (root / path.stem).is_dir():
            twins.append(f"{path.stem}/")
        if twins:
            raise ValueError(
                f"`folder` {str(root)!r} holds {path.name} and {', '.join(twins)}, which would "
                f"both be the task {path.stem!r}. Rename or remove one."
            )


def _warn_of_unread(root: Path) -> None:
    """Logs one line about files next to the tasks that may be tasks, and are not read."""
    others = [path for path in entries(root) if path.is_file() and path.suffix not in SUFFIXES]
    unread = Counter(
        "".join(path.suffixes[-2:]) if path.suffix in COMPRESSED else path.suffix
        for path in others
        if path.suffix.lower() in UNREAD or path.suffix.lower() in SUFFIXES
    )
    if unread:
        logger.warning(
            "%s: left out %d files of formats that are not read: %s; convert them to one of %s",
            root,
            unread.total(),
            ", ".join(f"{n} {suffix}" for suffix, n in sorted(unread.items())),
            _FORMATS,
        )


def _one_file(folder: Path, part: str) -> Path | None:
    """Returns the file of one part of a task."""
    found = [folder / f"{part}{s}" for s in SUFFIXES if (folder / f"{part}{s}").is_file()]
    if len(found) > 1:
        raise ValueError(
            f"{str(folder)!r} holds {' and '.join(f.name for f in found)}, of which only one can "
            f"be the records for {part}ing. Remove the other."
        )
    return found[0] if found else None


def _check_parts(folder: Path, parts: dict[str, Path | None]) -> None:
    """Raises an error if records of a task would be ignored because of their file's name."""
    used = [file for file in parts.values() if file is not None]
    complete = len(used) == 2  # next to both there may be labels.json or validation.json

    def holds_records(path: Path) -> bool:
        suffix, is_part = path.suffix.lower(), path.name.lower().startswith(("train", "test"))
        if complete:
            return is_part and suffix in SUFFIXES
        return suffix in SUFFIXES or (is_part and suffix in UNREAD)

    others = [path for path in entries(folder) if path.is_file() and path not in used]
    ignored = [path.name for path in others if holds_records(path)]
    if not ignored:
        return
    lacking = [f"{part}.json" for part, file in parts.items() if file is None]
    lacks = f", and lacks {' and '.join(lacking)}" if lacking else ""
    raise ValueError(
        f"the folder of a task should hold its records as train and test, but {str(folder)!r} "
        f"holds {', '.join(ignored)}{lacks}. Rename or remove them; expected are train.json and "
        f"test.json, or one of {_FORMATS}."
    )

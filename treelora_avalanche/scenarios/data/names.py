"""Names of files and folders that users did not make: hidden ones, and those that systems leave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

LEFT_BY_SYSTEMS = frozenset(
    {
        "__macosx",
        "__pycache__",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "desktop.ini",
    }
)
"""In lower case; macOS, Python, network drives, Windows, Linux."""


def is_left_out(name: str) -> bool:
    """Returns whether a file or folder is hidden, or left by a system.

    >>> [is_left_out(name) for name in (".ipynb_checkpoints", "._a.jpg", "__MACOSX", "ant")]
    [True, True, True, False]

    :param name: without the folders above.
    """
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def entries(folder: Path) -> Iterator[Path]:
    """Yields the files and folders of a folder, sorted, without those of :func:`is_left_out`.

    :param folder: the folder.
    """
    return (path for path in sorted(folder.iterdir()) if not is_left_out(path.name))


def subfolders(folder: Path) -> list[str]:
    """Returns the names of a folder's folders, sorted; links to folders above are left out too.

    :param folder: the folder.
    """
    return [p.name for p in entries(folder) if p.is_dir() and not _leads_back(p)]


def files_within(folder: Path) -> list[str]:
    """Returns the paths of the files at every depth, sorted by folder, then by name.

    :param folder: the folder. Hidden and left files and folders are left out, and so are symbolic
        links to a folder above, which would have no end.
    :raises OSError: if a folder cannot be read.
    """
    found: list[tuple[str, str]] = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = [
            name
            for name in folders
            if not is_left_out(name) and not _leads_back(Path(parent, name))
        ]
        found += [(parent, name) for name in files if not is_left_out(name)]
    return [os.path.join(*place) for place in sorted(found)]


def _leads_back(path: Path) -> bool:
    """Returns whether a folder is a link to one of the folders above it."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _raise(error: OSError) -> None:
    raise error

"""Names of files and folders that users did not make: hidden ones, and those that systems leave."""

from __future__ import annotations

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

"""Search for equal images in the training and the test set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from treelora_avalanche.scenarios.data.folders import ImageRecord

_TAIL = 4096


def check_overlap(root: Path, train: Iterable[ImageRecord], test: Iterable[ImageRecord]) -> None:
    """Raises an error if a file for training and a file for testing have the same content.

    :param root: the folder, for the error.
    :param train: images for training.
    :param test: images for testing.
    :raises ValueError: if there are equal files; the error names two.
    """
    test = list(test)
    pairs = equal_files((i.path for i in train), (i.path for i in test))
    if pairs:
        path, twin = (os.path.relpath(path, root) for path in pairs[0])
        raise ValueError(
            f"training and test images of `dataset_root` {str(root)!r} should differ, but "
            f"{len(pairs)} of {len(test)} test images are training images too, such as {twin!r}, "
            f"which equals {path!r}. Delete one of each two, or pass `allow_overlap=True`."
        )


def equal_files(first: Iterable[str], second: Iterable[str]) -> list[tuple[str, str]]:
    """Returns each file of ``second`` that has an equal in ``first``, as pairs (first, second).

    Compares sizes, then the last bytes, where images differ the most; the whole content of those
    that are still equal.

    >>> equal_files([], ["a.png"])
    []

    :param first: paths.
    :param second: paths.
    """
    ours, theirs = list(dict.fromkeys(first)), list(dict.fromkeys(second))
    steps: tuple[Callable[[str], Hashable], ...] = (os.path.getsize, _tail, _digest)
    for key in steps:
        keys, other_keys = {p: key(p) for p in ours}, {p: key(p) for p in theirs}
        common = set(keys.values()) & set(other_keys.values())
        ours = [path for path in ours if keys[path] in common]
        theirs = [path for path in theirs if other_keys[path] in common]
    one = {keys[path]: path for path in reversed(ours)}
    return [(one[other_keys[path]], path) for path in theirs]


def _tail(path: str) -> tuple[int, bytes]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - _TAIL))
        return size, hashlib.blake2b(file.read(), digest_size=16).digest()


def _digest(path: str) -> bytes:
    return hashlib.blake2b(Path(path).read_bytes()).digest()

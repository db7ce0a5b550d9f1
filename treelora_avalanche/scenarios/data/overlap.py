"""Search for equal images, or equal text records, in the training and the test set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from treelora_avalanche.scenarios.data.folders import ImageRecord
from treelora_avalanche.scenarios.data.text_records import Records

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


def check_text_overlap(
    task: str, train: tuple[Records, Sequence[int]], test: tuple[Records, Sequence[int]]
) -> None:
    """Raises an error if a record for testing has the prompt and the answer of one for training.

    :param task: name of the task, for the error.
    :param train: records for training, with their positions in the file.
    :param test: the same for testing.
    :raises ValueError: if there are equal records; the error names two.
    """
    number_of = dict(zip(reversed(train[0].records), reversed(train[1]), strict=True))
    pairs = [
        (number_of[record], number)
        for record, number in zip(test[0].records, test[1], strict=True)
        if record in number_of
    ]
    if pairs:
        first, second = pairs[0]
        raise ValueError(
            f"training and test records of task {task!r} should differ, but {len(pairs)} of "
            f"{len(test[1])} test records are training records too, such as record {second} of "
            f"{test[0].file}, whose prompt and answer are those of record {first} of "
            f"{train[0].file}. Delete one of each two, or pass `allow_overlap=True`."
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

"""Draws fewer images of each experience, balanced over its classes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from treelora_avalanche.scenarios.data.folders import ImageRecord


def limit_images(
    parts: Sequence[list[ImageRecord]],
    tasks: Sequence[Sequence[int]],
    class_names: Sequence[str],
    limit: int | None,
    seed: int | None,
) -> list[list[ImageRecord]]:
    """Returns the images to use of each part; see :func:`limit_rows`.

    :param parts: the images for training and for testing.
    :param tasks: the labels of each experience.
    :param class_names: the name of each label.
    :param limit: number of images of an experience in each part; None for all.
    :param seed: seed of the draw; None takes one from the global random state.
    :raises ValueError: if the limit is not positive, or an experience has more classes.
    """
    labels = [[image.label for image in images] for images in parts]
    rows = limit_rows(labels, tasks, class_names, limit, seed)
    return [[images[i] for i in kept] for images, kept in zip(parts, rows, strict=True)]


def limit_rows(
    parts: Sequence[Sequence[int]],
    tasks: Sequence[Sequence[int]],
    class_names: Sequence[str],
    limit: int | None,
    seed: int | None,
) -> list[list[int]]:
    """Draws at most ``limit`` samples of each experience from each part, balanced over its classes.

    Class c of size s_c gets min(s_c, q) samples, or one more, with q such that the limit is
    reached. A larger limit keeps the samples of a smaller one.

    >>> limit_rows([[0, 0, 0, 1]], [[0, 1]], ["ant", "bee"], 2, seed=0)
    [[0, 3]]

    :param parts: the labels of the samples for training and for testing.
    :param tasks: the labels of each experience.
    :param class_names: the name of each label; it seeds the draw of its class.
    :param limit: number of samples of an experience in each part; None for all.
    :param seed: seed of the draw; None takes one from the global random state.
    :return: positions of the samples to use in each part, ascending.
    :raises ValueError: if the limit is not positive, or an experience has more classes.
    """
    if limit is None:
        return [list(range(len(labels))) for labels in parts]
    if limit < 1:
        raise ValueError(f"`limit` should be at least 1, but is {limit}. Use None for all images.")
    most = max(map(len, tasks))
    if limit < most:
        raise ValueError(
            f"`limit` should be at least {most}, so that each class of an experience has an image, "
            f"but is {limit}. Raise it."
        )
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    return [_drawn(labels, tasks, class_names, limit, seed) for labels in parts]


def _drawn(
    labels: Sequence[int],
    tasks: Sequence[Sequence[int]],
    class_names: Sequence[str],
    limit: int,
    seed: int,
) -> list[int]:
    rows_of: dict[int, list[int]] = {label: [] for task in tasks for label in task}
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    kept: list[int] = []
    for task in tasks:
        left = limit
        smallest_first = sorted(task, key=lambda label: len(rows_of[label]))
        for position, label in enumerate(smallest_first):
            rows = rows_of[label]
            n = min(len(rows), left // (len(task) - position))
            left -= n
            # One generator per class: which images come first does not depend on the other classes.
            generator = torch.Generator()
            generator.manual_seed(seed ^ zlib.crc32(f"limit/{class_names[label]}".encode()))
            order = torch.randperm(len(rows), generator=generator)[:n].tolist()
            kept += [rows[i] for i in order]
    return sorted(kept)

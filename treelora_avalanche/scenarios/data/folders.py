"""From folders to lists: which image files there are, of which classes, for which part."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

LAYOUTS = (
    "Accepted are <root>/train/<class>/<image> with <root>/test/<class>/<image>, or "
    "<root>/<class>/<image>, of which a test set is drawn"
)


class ImageRecord(NamedTuple):
    path: str
    label: int


def class_folders(folder: Path, layouts: str = LAYOUTS) -> list[str]:
    try:
        return find_classes(folder)[0]
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} holds no class folders. {layouts}.") from None


def choose_classes(
    root: Path, train: list[str], test: list[str], classes: Sequence[str] | None
) -> list[str]:
    if classes is None:
        if train != test:
            alone = "; ".join(
                f"only in {part!r}: {', '.join(sorted(set(names) - set(others)))}"
                for part, names, others in (("train", train, test), ("test", test, train))
                if set(names) - set(others)
            )
            raise ValueError(
                f"'train' and 'test' of `dataset_root` {str(root)!r} hold different classes "
                f"({alone}). Complete them, or name the common ones in `classes=`."
            )
        return train
    names = list(classes)
    if not names or isinstance(classes, str) or len(set(names)) < len(names):
        raise ValueError(f"`classes` is {classes!r}; it must be a list of different class names.")
    known = [name for name in train if name in set(test)]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else "."
            raise ValueError(
                f"`classes` names {name!r}, which is not among the {len(known)} classes of "
                f"{str(root)!r}{hint}"
            )
    return names


def images_of(
    folder: Path, class_names: list[str], layouts: str = LAYOUTS
) -> list[list[ImageRecord]]:
    """The images of each class, sorted by path, so that the file system's order never matters."""
    label_of = {name: label for label, name in enumerate(class_names)}
    images: list[list[ImageRecord]] = [[] for _ in class_names]
    for path, label in make_dataset(folder, label_of, IMG_EXTENSIONS, allow_empty=True):
        images[label].append(ImageRecord(path, label))
    empty = [name for name, found in zip(class_names, images, strict=True) if not found]
    if empty:
        raise ValueError(
            f"no images in the class folders {', '.join(empty)} of {str(folder)!r} (known "
            f"extensions: {', '.join(IMG_EXTENSIONS)}). Fill them, delete them, or leave them out "
            "with `classes=`."
        )
    for name, found in zip(class_names, images, strict=True):
        if not any(Path(path).parent == folder / name for path, _ in found):
            raise ValueError(
                f"the images of {name!r} in {str(folder)!r} all lie in subfolders of it, such as "
                f"{found[0].path!r}. {layouts}."
            )
    return images


def draw_split(
    images: list[list[ImageRecord]], class_names: list[str], test_fraction: float, seed: int | None
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    if not 0 < test_fraction < 1:
        raise ValueError(f"`test_fraction` is {test_fraction}; it must lie between 0 and 1.")
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    train: list[ImageRecord] = []
    test: list[ImageRecord] = []
    for name, found in zip(class_names, images, strict=True):
        if len(found) < 2:
            raise ValueError(
                f"the class {name!r} has a single image, {found[0].path!r}; it takes two to draw "
                "a training and a test set. Add images, or leave the class out with `classes=`."
            )
        # One generator per class: the split of a class does not depend on which others are used.
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        n_test = min(max(round(test_fraction * len(found)), 1), len(found) - 1)
        drawn = set(torch.randperm(len(found), generator=generator)[:n_test].tolist())
        train += [image for i, image in enumerate(found) if i not in drawn]
        test += [image for i, image in enumerate(found) if i in drawn]
    return train, test

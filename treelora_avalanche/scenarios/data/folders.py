"""Image files of a folder, by class, for training and testing; nothing is decoded here."""

from __future__ import annotations

import logging
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from treelora_avalanche.choices import did_you_mean
from treelora_avalanche.scenarios.data.names import files_within, subfolders

LAYOUTS = (
    "Accepted are <root>/train/<class>/<image> with <root>/test/<class>/<image>, or "
    "<root>/<class>/<image>, from which a test set is drawn; one folder per task is for "
    "`ImageTasks`, one per domain for `DomainImageFolder`"
)
_UNREAD = (
    ".apng .arw .avif .avifs .cr2 .cr3 .dcm .dib .dng .exr .gif .hdr .heic .heif .hif .ico .j2k "
    ".jfif .jp2 .jpe .jpf .jpx .jxl .mpo .nef .orf .pbm .pcx .pfm .pnm .psd .qoi .raf .rw2 .svg "
    ".tga .xbm .xcf"
)
UNREAD_FORMATS = frozenset(_UNREAD.split())
"""Suffixes of images that are counted, but not read."""

logger = logging.getLogger(__name__)


class ImageRecord(NamedTuple):
    """One image file and its class.

    >>> ImageRecord("train/ant/0.png", 0).label
    0

    :param path: the file.
    :param label: its class.
    """

    path: str
    label: int


def list_images(
    root: Path, classes: Sequence[str] | None, test_fraction: float, seed: int | None
) -> tuple[list[ImageRecord], list[ImageRecord], list[str]]:
    """Returns the training images, the test images and the class names of a folder.

    :param root: a folder in one of the :data:`LAYOUTS`.
    :param classes: names of the classes to use; None for all, sorted by name.
    :param test_fraction: share of each class that is drawn for testing if no split is given.
    :param seed: seed of that draw; None takes one from the global random state.
    :raises ValueError: if the folder, its classes or their images do not fit a layout.
    """
    if not root.is_dir():
        raise ValueError(f"`dataset_root` should be a folder, but is {str(root)!r}. {LAYOUTS}.")
    given = [root / part for part in ("train", "test") if (root / part).is_dir()]
    if len(given) == 1 and subfolders(given[0]):
        missing = "test" if given[0].name == "train" else "train"
        raise ValueError(
            f"`dataset_root` {str(root)!r} has a folder {given[0].name!r} with classes but none "
            f"named {missing!r}. {LAYOUTS}."
        )
    return read_parts(root, given if len(given) == 2 else [root], classes, test_fraction, seed)


def read_parts(
    root: Path,
    parts: Sequence[Path],
    classes: Sequence[str] | None,
    test_fraction: float,
    seed: int | None,
    layouts: str = LAYOUTS,
) -> tuple[list[ImageRecord], list[ImageRecord], list[str]]:
    """Returns the training images, the test images and the class names of folders of classes.

    :param root: the folder, for the errors.
    :param parts: the folders for training and for testing, or the one to draw both from.
    :param classes: names of the classes to use; None for all, sorted by name.
    :param test_fraction: share of each class that is drawn for testing if no split is given.
    :param seed: seed of that draw; None takes one from the global random state.
    :param layouts: the accepted layouts, for the errors.
    :raises ValueError: if the folders, their classes or their images do not fit.
    """
    names = [list_class_folders(part, layouts) for part in parts]
    class_names = select_classes(root, names[0], names[-1], classes)
    unread: Counter[str] = Counter()
    images = [images_by_class(part, class_names, layouts, unread) for part in parts]
    warn_of_unread(root, unread)
    if len(parts) == 2:
        train, test = (list(chain(*found)) for found in images)
    else:
        train, test = draw_test_split(images[0], class_names, test_fraction, seed)
    return train, test, class_names


def list_class_folders(folder: Path, layouts: str = LAYOUTS) -> list[str]:
    """Returns the names of the subfolders, sorted, without hidden ones and those of systems.

    :param folder: where to look.
    :param layouts: the accepted layouts, for the error.
    :raises ValueError: if there are no subfolders.
    """
    names = subfolders(folder)
    if not names:
        raise ValueError(f"{str(folder)!r} holds no class folders. {layouts}.")
    return names


def select_classes(
    root: Path, train: list[str], test: list[str], classes: Sequence[str] | None
) -> list[str]:
    """Returns the names of the classes to use; the position of a name is its label.

    :param root: the folder, for the errors.
    :param train: classes that have training images.
    :param test: classes that have test images.
    :param classes: names chosen by the user; None for all.
    :raises ValueError: if ``train`` and ``test`` differ and no names are chosen, or if a chosen
        name is unknown or occurs twice.
    """
    if classes is None:
        if train != test:
            alone = "; ".join(
                f"only in {part!r}: {', '.join(sorted(set(names) - set(others)))}"
                for part, names, others in (("train", train, test), ("test", test, train))
                if set(names) - set(others)
            )
            raise ValueError(
                f"'train' and 'test' of `dataset_root` {str(root)!r} should hold the same classes, "
                f"but do not ({alone}). Complete them, or name the common ones in `classes=`."
            )
        return train
    names = list(classes)
    if not names or isinstance(classes, str) or len(set(names)) < len(names):
        raise ValueError(
            f"`classes` should be a list of different class names, but is {classes!r}. Name each "
            "class once."
        )
    known = [name for name in train if name in set(test)]
    for name in names:
        if name not in known:
            raise ValueError(
                f"`classes` should name some of the {len(known)} classes of {str(root)!r}, but "
                f"contains {name!r}.{did_you_mean(name, known)}"
            )
    return names


def images_by_class(
    folder: Path,
    class_names: list[str],
    layouts: str = LAYOUTS,
    unread: Counter[str] | None = None,
) -> list[list[ImageRecord]]:
    """Returns the images of each class, sorted by path, in the same order on every file system.

    Hidden files and folders, and those that systems leave, are skipped at every depth.

    :param folder: holds one subfolder per class.
    :param class_names: the subfolders to read; the position of a name is its label.
    :param layouts: the accepted layouts, for the error.
    :param unread: counts image files of formats that are not read, by suffix.
    :raises ValueError: if a class has no images, or has them in subfolders only.
    """
    images: list[list[ImageRecord]] = [[] for _ in class_names]
    for label, name in enumerate(class_names):
        for path in files_within(folder / name):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in IMG_EXTENSIONS:
                images[label].append(ImageRecord(path, label))
            elif suffix in UNREAD_FORMATS and unread is not None:
                unread[suffix] += 1
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


def warn_of_unread(root: Path, unread: Counter[str]) -> None:
    """Logs one line about image files of formats that are not read.

    :param root: the folder.
    :param unread: their number, by suffix.
    """
    if unread:
        logger.warning(
            "%s: left out %d images of formats that are not read: %s; convert them to one of %s",
            root,
            unread.total(),
            ", ".join(f"{n} {suffix}" for suffix, n in sorted(unread.items())),
            ", ".join(IMG_EXTENSIONS),
        )


def draw_test_split(
    images: list[list[ImageRecord]], class_names: list[str], test_fraction: float, seed: int | None
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Draws a stratified test set; returns the training images and the test images.

    :param images: the images of each class.
    :param class_names: names of the classes; each seeds the draw of its class.
    :param test_fraction: share of each class that is drawn, at least one image and not all.
    :param seed: seed of the draw; None takes one from the global random state.
    :raises ValueError: if the share is not between 0 and 1, or a class has a single image.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"`test_fraction` should be between 0 and 1, but is {test_fraction}. The usual share "
            "is 0.2."
        )
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    train: list[ImageRecord] = []
    test: list[ImageRecord] = []
    for name, found in zip(class_names, images, strict=True):
        if len(found) < 2:
            raise ValueError(
                f"the class {name!r} has a single image, {found[0].path!r}, but a training and a "
                "test set need two. Add images, or leave the class out with `classes=`."
            )
        # One generator per class: the split of a class does not depend on which others are used.
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        n_test = min(max(round(test_fraction * len(found)), 1), len(found) - 1)
        drawn = set(torch.randperm(len(found), generator=generator)[:n_test].tolist())
        train += [image for i, image in enumerate(found) if i not in drawn]
        test += [image for i, image in enumerate(found) if i in drawn]
    return train, test

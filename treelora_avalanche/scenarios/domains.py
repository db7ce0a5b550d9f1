"""Domain-incremental benchmarks of images: the same classes in one domain after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import GenericCLScenario, dataset_benchmark
from torch import Tensor, nn

from treelora_avalanche.choices import did_you_mean
from treelora_avalanche.models.vision import ImagePreprocessing, as_preprocessing
from treelora_avalanche.scenarios.data.folders import (
    ImageRecord,
    draw_test_split,
    images_by_class,
    list_class_folders,
    select_classes,
    warn_of_unread,
)
from treelora_avalanche.scenarios.data.images import image_datasets
from treelora_avalanche.scenarios.data.limit import limit_images
from treelora_avalanche.scenarios.data.names import subfolders
from treelora_avalanche.scenarios.data.overlap import check_overlap

LAYOUTS = (
    "Accepted are <root>/train/<domain>/<class>/<image> with <root>/test/<domain>/<class>/<image>, "
    "or <root>/<domain>/<class>/<image>, from which a test set is drawn"
)


def DomainImageFolder(
    dataset_root: str | Path,
    *,
    domains: Sequence[str] | None = None,
    preprocessing: ImagePreprocessing | nn.Module | None = None,
    train_transform: Callable[[Tensor], Any] | None = None,
    eval_transform: Callable[[Tensor], Any] | None = None,
    classes: Sequence[str] | None = None,
    seed: int | None = None,
    shuffle: bool = True,
    test_fraction: float = 0.2,
    limit: int | None = None,
    cache_bytes: int = 2 * 1024**3,
    allow_overlap: bool = False,
) -> GenericCLScenario:
    """Returns a folder of images, one subfolder per domain, as a domain-incremental benchmark.

    Every experience holds all classes, in one domain; as in PACS (Li et al. 2017, "Deeper, Broader
    and Artier Domain Generalization"), DomainNet or Office-Home. Two layouts are accepted:
    ``root/train/<domain>/<class>/*`` with ``root/test/<domain>/<class>/*``, a given split; and
    ``root/<domain>/<class>/*``, from which a test set is drawn, stratified by domain and class.
    Files that are not images are ignored, images of any mode are read as RGB. The task label is 0
    everywhere, so that a strategy cannot read the domain from it.

    Example::

        model = timm.create_model("vit_tiny_patch16_224", pretrained=True, num_classes=7)
        benchmark = DomainImageFolder(
            "pacs", domains=["photo", "sketch"], preprocessing=model
        )

    :param dataset_root: the folder.
    :param domains: names of the domain folders to use, in order of arrival; overrides the drawn
        order. By default all.
    :param preprocessing: resizing and normalisation of the images: pass the timm model, or its
        ``image_preprocessing(model)``. By default timm's for ImageNet at 224 pixels.
    :param train_transform: applied to the resized uint8 image ``(3, height, width)`` of the train
        stream; by default ``preprocessing.normalize``. For augmentation, compose it with that.
    :param eval_transform: the same for the test stream.
    :param classes: names of the class folders to use; ``classes[i]`` gets label i. By default all,
        sorted by name.
    :param seed: seed of the order of the domains and of the drawn split; None draws both from the
        global random state.
    :param shuffle: whether to draw the order; if False, domains arrive in alphabetical order.
    :param test_fraction: share of each class of each domain that is drawn for testing if no split
        is given.
    :param limit: number of training images, and of test images, used of each domain, drawn by
        ``seed`` and balanced over the classes; None for all.
    :param cache_bytes: limit of the resized images in memory, one byte per value; above it, files
        are read on access. Benchmarks of the same files and the same preprocessing share one copy.
    :param allow_overlap: whether an image may be for training and for testing, in any domain.
    :return: the benchmark, one experience per domain in both streams. It carries ``domain_names``
        (``domain_names[experience.current_experience]``), ``class_names`` (``class_names[label]``)
        and ``n_classes``.
    :raises ValueError: if the folder fits no layout, a domain or a class is unknown, the domains
        hold different classes, or images for training and for testing are equal.
    :raises OSError: if an image cannot be read (on access if the images are not cached).
    """
    root = Path(dataset_root).expanduser()
    preprocessing = as_preprocessing(preprocessing)
    parts = _parts(root)
    names = _choose_domains(root, parts, domains)
    if domains is None and shuffle:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    class_names = _common_classes(root, parts, names, classes)

    train: list[list[ImageRecord]] = []
    test: list[list[ImageRecord]] = []
    if seed is None and (len(parts) == 1 or limit is not None):  # one seed for all domains
        seed = int(torch.randint(2**31, ()))
    unread: Counter[str] = Counter()
    for name in names:
        found = [images_by_class(part / name, class_names, LAYOUTS, unread) for part in parts]
        if len(found) == 2:
            train_images, test_images = (list(chain(*images)) for images in found)
        else:
            cells = _cells(name, class_names)
            train_images, test_images = draw_test_split(found[0], cells, test_fraction, seed)
        train.append(train_images)
        test.append(test_images)

    warn_of_unread(root, unread)
    if not allow_overlap:
        check_overlap(root, list(chain(*train)), list(chain(*test)))
    labels = [range(len(class_names))]
    for i, name in enumerate(names):
        cells = _cells(name, class_names)
        train[i], test[i] = limit_images([train[i], test[i]], labels, cells, limit, seed)
    datasets = image_datasets(train + test, preprocessing, cache_bytes)
    # The generator of the same family as `nc_benchmark`, with which Avalanche's strategies work.
    benchmark = dataset_benchmark(
        datasets[: len(names)],
        datasets[len(names) :],
        train_transform=train_transform or preprocessing.normalize,
        eval_transform=eval_transform or preprocessing.normalize,
    )
    benchmark.domain_names = names
    benchmark.preprocessing = preprocessing if eval_transform is None else None
    benchmark.class_names = class_names
    benchmark.n_classes = len(class_names)
    return benchmark


def _cells(domain: str, class_names: list[str]) -> list[str]:
    """Returns the names of the classes in a domain, for errors; they seed the draws."""
    return [f"{domain}/{class_name}" for class_name in class_names]


def _parts(root: Path) -> list[Path]:
    """Returns the folders for training and for testing, or the one to draw both from."""
    if not root.is_dir():
        raise ValueError(f"`dataset_root` should be a folder, but is {str(root)!r}. {LAYOUTS}.")
    given = [root / part for part in ("train", "test") if (root / part).is_dir()]
    if len(given) == 2:
        return given
    if given and any(subfolders(given[0] / name) for name in subfolders(given[0])):
        missing = "test" if given[0].name == "train" else "train"
        raise ValueError(
            f"`dataset_root` {str(root)!r} has a folder {given[0].name!r} with domains but none "
            f"named {missing!r}. {LAYOUTS}."
        )
    return [root]


def _choose_domains(root: Path, parts: list[Path], domains: Sequence[str] | None) -> list[str]:
    found = [list_class_folders(part, LAYOUTS) for part in parts]
    known = sorted(set(found[0]).intersection(*found))
    if domains is None:
        alone = sorted(set(chain(*found)) - set(known))
        if alone:
            raise ValueError(
                f"'train' and 'test' of `dataset_root` {str(root)!r} should hold the same domains, "
                f"but do not (in one of them only: {', '.join(alone)}). Complete them, or name the "
                "common ones in `domains=`."
            )
        return known
    names = list(domains)
    if not names or isinstance(domains, str) or len(set(names)) < len(names):
        raise ValueError(
            f"`domains` should be a list of different domain names, but is {domains!r}. Name each "
            "domain once."
        )
    for name in names:
        if name not in known:
            raise ValueError(
                f"`domains` should name some of the {len(known)} domain folders of {str(root)!r} "
                f"({', '.join(known)}), but contains {name!r}.{did_you_mean(name, known)}"
            )
    return names


def _common_classes(
    root: Path, parts: list[Path], domains: list[str], classes: Sequence[str] | None
) -> list[str]:
    folders = [part / domain for domain in domains for part in parts]
    found = {folder: set(list_class_folders(folder, LAYOUTS)) for folder in folders}
    everything = set(chain(*found.values()))
    common = sorted(everything.intersection(*found.values()))
    if classes is None and len(common) < len(everything):
        lacking = "; ".join(
            f"{folder.relative_to(root)} lacks {', '.join(sorted(everything - names))}"
            for folder, names in sorted(found.items())
            if everything - names
        )
        raise ValueError(
            f"the domains of `dataset_root` {str(root)!r} should hold the same classes, but do not "
            f"({lacking}). Complete them, or name the common ones in `classes=`"
            f"{': ' + ', '.join(common) if common else ' (there are none)'}. Folders with classes "
            "of their own are tasks for `ImageTasks` (`--scenario image_tasks`)."
        )
    return select_classes(root, common, common, classes)

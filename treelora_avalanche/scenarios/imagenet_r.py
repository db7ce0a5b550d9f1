"""ImageNet-R as a class-incremental benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avalanche.benchmarks import NCScenario
from torch import Tensor, nn

from treelora_avalanche.models.vision import ImagePreprocessing, as_preprocessing
from treelora_avalanche.scenarios.data.archives import IMAGENET_R, published_folder
from treelora_avalanche.scenarios.data.class_incremental import divide_classes, split_by_class
from treelora_avalanche.scenarios.data.folders import list_class_folders, list_images
from treelora_avalanche.scenarios.data.images import image_datasets
from treelora_avalanche.scenarios.data.limit import limit_images
from treelora_avalanche.scenarios.data.task_file import TaskClasses

N_IMAGES = 30_000

# WordNet identifiers, the class folders; from https://github.com/hendrycks/imagenet-r, eval.py.
_WNIDS = """
    n01443537 n01484850 n01494475 n01498041 n01514859 n01518878 n01531178 n01534433 n01614925
    n01616318 n01630670 n01632777 n01644373 n01677366 n01694178 n01748264 n01770393 n01774750
    n01784675 n01806143 n01820546 n01833805 n01843383 n01847000 n01855672 n01860187 n01882714
    n01910747 n01944390 n01983481 n01986214 n02007558 n02009912 n02051845 n02056570 n02066245
    n02071294 n02077923 n02085620 n02086240 n02088094 n02088238 n02088364 n02088466 n02091032
    n02091134 n02092339 n02094433 n02096585 n02097298 n02098286 n02099601 n02099712 n02102318
    n02106030 n02106166 n02106550 n02106662 n02108089 n02108915 n02109525 n02110185 n02110341
    n02110958 n02112018 n02112137 n02113023 n02113624 n02113799 n02114367 n02117135 n02119022
    n02123045 n02128385 n02128757 n02129165 n02129604 n02130308 n02134084 n02138441 n02165456
    n02190166 n02206856 n02219486 n02226429 n02233338 n02236044 n02268443 n02279972 n02317335
    n02325366 n02346627 n02356798 n02363005 n02364673 n02391049 n02395406 n02398521 n02410509
    n02423022 n02437616 n02445715 n02447366 n02480495 n02480855 n02481823 n02483362 n02486410
    n02510455 n02526121 n02607072 n02655020 n02672831 n02701002 n02749479 n02769748 n02793495
    n02797295 n02802426 n02808440 n02814860 n02823750 n02841315 n02843684 n02883205 n02906734
    n02909870 n02939185 n02948072 n02950826 n02951358 n02966193 n02980441 n02992529 n03124170
    n03272010 n03345487 n03372029 n03424325 n03452741 n03467068 n03481172 n03494278 n03495258
    n03498962 n03594945 n03602883 n03630383 n03649909 n03676483 n03710193 n03773504 n03775071
    n03888257 n03930630 n03947888 n04086273 n04118538 n04133789 n04141076 n04146614 n04147183
    n04192698 n04254680 n04266014 n04275548 n04310018 n04325704 n04347754 n04389033 n04409515
    n04465501 n04487394 n04522168 n04536866 n04552348 n04591713 n07614500 n07693725 n07695742
    n07697313 n07697537 n07714571 n07714990 n07718472 n07720875 n07734744 n07742313 n07745940
    n07749582 n07753275 n07753592 n07768694 n07873807 n07880968 n07920052 n09472597 n09835506
    n10565667 n12267677
"""
WNIDS = tuple(_WNIDS.split())


def SplitImageNetR(
    n_experiences: int | None = None,
    *,
    dataset_root: str | Path,
    download: bool = False,
    preprocessing: ImagePreprocessing | nn.Module | None = None,
    train_transform: Callable[[Tensor], Any] | None = None,
    eval_transform: Callable[[Tensor], Any] | None = None,
    classes: Sequence[str] | None = None,
    per_exp_classes: Mapping[int, int] | None = None,
    fixed_class_order: Sequence[str | int] | None = None,
    task_classes: TaskClasses | None = None,
    seed: int | None = None,
    shuffle: bool = True,
    test_fraction: float = 0.2,
    limit: int | None = None,
    cache_bytes: int = 2 * 1024**3,
    return_task_id: bool = False,
) -> NCScenario:
    """Returns ImageNet-R, split by class: 30,000 renditions of 200 classes of ImageNet.

    Paintings, sketches, toys, graffiti ... (Hendrycks et al. 2021, "The Many Faces of Robustness",
    https://github.com/hendrycks/imagenet-r). Two layouts are accepted: the published one,
    ``imagenet-r/<wnid>/*``, and ``imagenet-r/{train,test}/<wnid>/*``, a given split, as in PILOT
    and the repositories derived from DualPrompt.

    There is no official split. The convention since DualPrompt (Wang et al. 2022) is 24,000 random
    images for training and 6,000 for testing, drawn over all images at once. Ours is stratified by
    class, and depends on ``seed`` alone. To reproduce a published split, give it as folders.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=200)
        benchmark = SplitImageNetR(
            10, dataset_root="data", preprocessing=model, seed=0
        )

    :param n_experiences: number of experiences, which share the classes evenly; by default 10, or
        that of ``task_classes``, or of ``per_exp_classes`` if they sum up to all classes.
    :param dataset_root: the folder that contains ``imagenet-r``, or that folder itself.
    :param download: whether to download and unpack a missing archive (2.2 GB).
    :param preprocessing: resizing and normalisation of the images: pass the timm model, or its
        ``image_preprocessing(model)``. By default timm's for ImageNet at 224 pixels.
    :param train_transform: applied to the resized uint8 image ``(3, height, width)`` of the train
        stream; by default ``preprocessing.normalize``. For augmentation, compose it with that.
    :param eval_transform: the same for the test stream.
    :param classes: names of the class folders to use; ``classes[i]`` gets label i. By default all
        200, sorted by name; none may be missing then.
    :param per_exp_classes: number of classes by experience, from 0, such as ``{0: 50}``; the other
        experiences share the remaining classes evenly.
    :param fixed_class_order: names or labels of all classes in the order in which they arrive;
        overrides the drawn order. Strings are names; if none of them is one, they are labels.
    :param task_classes: names of the classes of each task, ``{"pets": ["cat", "dog"], ...}``, or a
        YAML or JSON file of that; instead of the three above and the drawn order.
    :param seed: seed of the class order and of the drawn split; None draws both from the global
        random state.
    :param shuffle: whether to draw the class order; if False, labels arrive in ascending order.
    :param test_fraction: share of each class that is drawn for testing if no split is given.
    :param limit: number of training images, and of test images, used of each experience, drawn by
        ``seed`` and balanced over its classes; None for all.
    :param cache_bytes: limit of the resized images in memory, one byte per value (4.5 GB at 224
        pixels); above it, files are read on access. Benchmarks of the same files and the same
        preprocessing share one copy.
    :param return_task_id: if True, every experience has its own task label, else all have 0.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``) and ``n_classes``.
    :raises ValueError: if classes or images are missing, or the classes cannot be divided as asked
        for.
    :raises OSError: if the folder is missing or the archive cannot be downloaded; if an image
        cannot be read (on access if the images are not cached).
    """
    root = published_folder(IMAGENET_R, dataset_root, download, _is_imagenet_r)
    preprocessing = as_preprocessing(preprocessing)
    if classes is None:
        _check_classes(root)
    train, test, class_names = list_images(root, classes, test_fraction, seed)
    if classes is None and len(train) + len(test) != N_IMAGES:
        raise ValueError(
            f"{str(root)!r} should hold the {N_IMAGES:,} images of ImageNet-R, but holds "
            f"{len(train) + len(test):,}. Unpack {IMAGENET_R.url} again, or name the classes to "
            "use in `classes=`: their images are not counted."
        )
    tasks = divide_classes(
        class_names,
        n_experiences,
        per_exp_classes=per_exp_classes,
        fixed_class_order=fixed_class_order,
        task_classes=task_classes,
        seed=seed,
        shuffle=shuffle,
    )
    train, test = limit_images([train, test], tasks, class_names, limit, seed)
    train_set, test_set = image_datasets([train, test], preprocessing, cache_bytes)
    return split_by_class(
        train_set,
        test_set,
        class_names,
        tasks,
        return_task_id=return_task_id,
        preprocessing=preprocessing,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def _parts(root: Path) -> list[Path]:
    given = [root / "train", root / "test"]
    return given if all(part.is_dir() for part in given) else [root]


def _is_imagenet_r(root: Path) -> bool:
    folders = (f for f in _parts(root)[0].iterdir() if f.is_dir())
    return any(re.fullmatch(r"n\d{8}", folder.name) for folder in folders)


def _check_classes(root: Path) -> None:
    for part in _parts(root):
        found = set(list_class_folders(part))
        missing = sorted(set(WNIDS) - found)
        others = sorted(found - set(WNIDS))
        if missing or others:
            listed = [
                f"{len(names)} {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
                for what, names in (("missing", missing), ("unknown", others))
                if names
            ]
            raise ValueError(
                f"{str(part)!r} should hold the {len(WNIDS)} class folders of ImageNet-R, but "
                f"holds {len(found)} ({'; '.join(listed)}). Unpack {IMAGENET_R.url} again, or name "
                "the classes to use in `classes=`."
            )

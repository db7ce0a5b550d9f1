"""scikit-learn's digits as a class-incremental benchmark: no download, seconds to train on."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.benchmarks import NCScenario
from torch import Tensor
from torch.utils.data import Dataset

from treelora_avalanche.models.digits import load_digits
from treelora_avalanche.scenarios.data.class_incremental import divide_classes, split_by_class


class LabelledImages(Dataset):
    """Images with their labels as Python integers, as Avalanche expects.

    >>> import torch
    >>> LabelledImages(torch.zeros(2, 1, 8, 8), torch.tensor([3, 5])).targets
    [3, 5]

    :param images: ``(n, 1, 8, 8)``.
    :param labels: ``(n,)``.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.targets: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


def SplitDigits(
    n_experiences: int = 5,
    *,
    seed: int | None = None,
    fixed_class_order: Sequence[int] | None = None,
    shuffle: bool = True,
    return_task_id: bool = False,
) -> NCScenario:
    """Returns scikit-learn's 1,797 handwritten digits, split by class.

    Samples are ``(1, 8, 8)`` float tensors in [-1, 1]. The split into 1,347 training and 450 test
    images is fixed and stratified; the label of a digit is the digit.

    Example::

        benchmark = SplitDigits(5, seed=0)
        SeqLoRA(pretrained_digits_vit(), train_mb_size=32).train(benchmark.train_stream)

    :param n_experiences: number of experiences; a divisor of 10.
    :param seed: seed of the class order; None draws it from the global random state.
    :param fixed_class_order: labels in the order in which they arrive; overrides the drawn order.
    :param shuffle: whether to draw the order; if False, the digits arrive in ascending order.
    :param return_task_id: if True, every experience has its own task label, else all have 0.
    :return: the benchmark; it carries ``class_names`` and ``n_classes``.
    """
    digits = load_digits()
    names = [str(digit) for digit in range(10)]
    return split_by_class(
        LabelledImages(digits.train_images, digits.train_labels),
        LabelledImages(digits.test_images, digits.test_labels),
        names,
        divide_classes(
            names, n_experiences, seed=seed, fixed_class_order=fixed_class_order, shuffle=shuffle
        ),
        return_task_id=return_task_id,
    )


def digits_images() -> Tensor:
    """Returns the training images of :func:`SplitDigits` without labels, ``(1347, 1, 8, 8)``.

    For self-supervised pretraining, see
    :func:`treelora_avalanche.models.pretrain_self_supervised`.
    """
    return load_digits().train_images.clone()

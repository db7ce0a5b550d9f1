"""A tiny vision transformer and a tiny class-incremental benchmark, made without downloads."""

from __future__ import annotations

import torch
from avalanche.benchmarks import NCScenario, nc_benchmark
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import Dataset

N_CLASSES = 6


def tiny_vit(num_classes: int = N_CLASSES, depth: int = 3) -> VisionTransformer:
    """Returns a timm ViT for 8 x 8 images, with the same random weights at every call.

    :param num_classes: classes of the head.
    :param depth: number of blocks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=8,
            patch_size=4,
            in_chans=1,
            embed_dim=16,
            depth=depth,
            num_heads=2,
            num_classes=num_classes,
        )


class _LabelledImages(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Tensor, targets: Tensor):
        self.images = images
        self.targets: list[int] = targets.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


def tiny_benchmark() -> NCScenario:
    """Returns three experiences of two classes; images are class patterns with noise.

    16 training and 8 test images per class, ``(1, 8, 8)``; the task label is 0 everywhere.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(N_CLASSES, 1, 8, 8, generator=generator)

    def dataset(n_per_class: int) -> _LabelledImages:
        targets = torch.arange(N_CLASSES).repeat_interleave(n_per_class)
        noise = torch.randn(len(targets), 1, 8, 8, generator=generator)
        return _LabelledImages(patterns[targets] + 0.5 * noise, targets)

    return nc_benchmark(dataset(16), dataset(8), n_experiences=3, task_labels=False, shuffle=False)

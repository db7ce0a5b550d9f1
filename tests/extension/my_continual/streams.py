"""The digits under noise."""

import torch
from avalanche.benchmarks import nc_benchmark
from torch.utils.data import TensorDataset

from treelora_avalanche.models.digits import load_digits


def NoisyDigits(n_experiences: int = 5, *, noise: float = 0.5, seed: int = 0):
    """Class-incremental digits with Gaussian noise.

    :param n_experiences: number of tasks; a divisor of 10.
    :param noise: standard deviation; pixels are in [-1, 1].
    :param seed: seed of the noise and of the class order.
    """
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)

    def dataset(images, labels):
        noisy = images + noise * torch.randn(images.shape, generator=generator)
        data = TensorDataset(noisy, labels)
        data.targets = labels.tolist()  # which Avalanche reads
        return data

    return nc_benchmark(
        dataset(digits.train_images, digits.train_labels),
        dataset(digits.test_images, digits.test_labels),
        n_experiences,
        task_labels=False,
        seed=seed,
    )

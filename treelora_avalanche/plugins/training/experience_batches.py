"""Batches of the current experience, for plugins that read its data outside the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader


def experience_batches(
    strategy: Any, batch_size: int, n_samples: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs and targets of the current experience, with its evaluation transforms.

    :param strategy: an Avalanche strategy in an experience.
    :param batch_size: samples per batch.
    :param n_samples: number of samples drawn at random, by torch's global generator; by default
        all, in order.
    :return: batches on the strategy's device.
    """
    dataset = strategy.experience.dataset.eval()
    if n_samples is not None:
        dataset = dataset.subset(torch.randperm(len(dataset))[:n_samples].tolist())
    for x, y, *_ in DataLoader(dataset, batch_size, collate_fn=dataset.collate_fn):
        yield x.to(strategy.device), y.to(strategy.device)

"""Cached frozen-layer outputs of a language model, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from avalanche.benchmarks.utils import TaskAwareSupervisedClassificationDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from treelora_avalanche.models.token_batches import LengthBatchSampler, collate_hidden_states
from treelora_avalanche.models.tokens import crop


class HiddenRows(Dataset[tuple[Tensor, Tensor]]):
    """Hidden states of token sequences of different lengths, concatenated.

    >>> rows = HiddenRows([2, 3], torch.zeros(5, 16), torch.zeros(5))
    >>> rows[1][0].shape
    torch.Size([3, 16])

    :param lengths: tokens of every sequence.
    :param hidden: ``(n_tokens, dim)``, of all sequences together.
    :param targets: ``(n_tokens,)``, likewise.
    """

    def __init__(self, lengths: list[int], hidden: Tensor, targets: Tensor):
        self.ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self.hidden = hidden
        self.targets = targets

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = slice(self.ends[index], self.ends[index + 1])
        return self.hidden[tokens], self.targets[tokens]

    def put(self, index: int, hidden: Tensor, targets: Tensor) -> None:
        """Writes a sequence.

        :param index: its number.
        :param hidden: ``(width, dim)``, padded on the right.
        :param targets: ``(width,)``.
        """
        own_hidden, own_targets = self[index]
        own_hidden.copy_(hidden[: len(own_hidden)])
        own_targets.copy_(targets[: len(own_targets)])


def rows_of(
    dataset: Any, rows: list[int], batch_size: int, **options: Any
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yields some token sequences of a dataset, batched by similar length, the longest first.

    :param dataset: a dataset of token sequences with an attribute ``lengths``.
    :param rows: indices of the sequences.
    :param batch_size: sequences per batch.
    :param options: further arguments of the loader.
    :return: indices, tokens ``(batch, longest)``, and targets ``(batch, width)``.
    """
    if not rows:
        return
    lengths = list(dataset.lengths)
    sampler = LengthBatchSampler([lengths[row] for row in rows], batch_size, shuffle=False)
    batches = [[rows[i] for i in batch] for batch in sampler]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate_fn, **options)
    for batch, (x, y, *_) in zip(batches, loader, strict=True):
        yield batch, crop(x), y


def like(dataset: Any, rows: HiddenRows) -> TaskAwareSupervisedClassificationDataset[Any]:
    """Returns a dataset of hidden states with the attributes that Avalanche reads from that of
    tokens.

    :param dataset: the token sequences.
    :param rows: the output of the frozen layers for them.
    """
    return TaskAwareSupervisedClassificationDataset(
        [rows],
        data_attributes=[dataset.targets, dataset.lengths, dataset.targets_task_labels],
        # Loaders that do not sort by length pad to the full width, as for tokens.
        collate_fn=partial(collate_hidden_states, width=len(dataset[0][0])),
    )

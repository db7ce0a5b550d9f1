"""What the frozen layers of a language model make of texts, without the padding."""

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
    """Rows of hidden states of their own lengths, one after the other.

    :param lengths: tokens of every row.
    :param hidden: ``(n_tokens, dim)``, of all rows together.
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
        """Fills a row.

        :param index: which one.
        :param hidden: ``(width, dim)``, padded on the right.
        :param targets: ``(width,)``.
        """
        own_hidden, own_targets = self[index]
        own_hidden.copy_(hidden[: len(own_hidden)])
        own_targets.copy_(targets[: len(own_targets)])


def rows_of(
    dataset: Any, rows: list[int], batch_size: int, **options: Any
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Some rows of a dataset, those of similar length together, the longest first.

    :param dataset: a dataset of rows of tokens with an attribute ``lengths``.
    :param rows: their numbers.
    :param batch_size: rows per batch.
    :param options: further arguments of the loader.
    :return: numbers of rows, tokens ``(batch, longest)``, and targets ``(batch, width)``.
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
    """A dataset of hidden rows with all that Avalanche wants to know of the dataset of tokens.

    :param dataset: the rows of tokens.
    :param rows: what the prefix has made of them.
    """
    return TaskAwareSupervisedClassificationDataset(
        [rows],
        data_attributes=[dataset.targets, dataset.lengths, dataset.targets_task_labels],
        # Loaders that do not sort by length pad to the full width, as that of the tokens.
        collate_fn=partial(collate_hidden_states, width=len(dataset[0][0])),
    )

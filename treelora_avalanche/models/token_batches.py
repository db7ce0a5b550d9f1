"""Batches of token sequences: samples of similar length together, padded to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, default_collate

from treelora_avalanche.models.token_loss import IGNORED
from treelora_avalanche.models.tokens import crop

WINDOW = 64
"""Batches whose samples are sorted together: more waste less padding, fewer mix better."""


class LengthBatchSampler(Sampler[list[int]]):
    """Samples batches of similar length.

    The samples are shuffled, sorted by length within windows of :data:`WINDOW` batches, cut into
    batches, and the batches shuffled; all by torch's global generator. Without shuffling, all
    samples are sorted, the longest first:

    >>> list(LengthBatchSampler([3, 9, 4, 8], batch_size=2, shuffle=False))
    [[1, 3], [2, 0]]

    :param lengths: the length of every sample.
    :param batch_size: samples per batch.
    :param shuffle: whether to shuffle.
    :param drop_last: whether to leave out a batch that is not full.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
    ):
        self.lengths = torch.as_tensor(list(lengths))
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last

    def __len__(self) -> int:
        n = len(self.lengths)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        n = len(self.lengths)
        if not self.shuffle:
            yield from self._batches(torch.arange(n))
            return
        batches = [
            batch
            for window in torch.randperm(n).split(WINDOW * self.batch_size)
            for batch in self._batches(window)
        ]
        for i in torch.randperm(len(batches)).tolist():
            yield batches[i]

    def _batches(self, samples: Tensor) -> Iterator[list[int]]:
        if not len(samples):  # `split` would give one empty batch
            return
        by_length = self.lengths[samples].argsort(descending=True, stable=True)
        for batch in samples[by_length].split(self.batch_size):
            if not self.drop_last or len(batch) == self.batch_size:
                yield batch.tolist()


def collate_tokens(samples: Sequence[Any]) -> list[Tensor]:
    """Returns a batch of token sequences, without the columns that are padding in all of them.

    The targets keep the last columns alone, from the first that has a target in some sample: their
    width is how many columns of logits are needed.

    :param samples: tuples of tokens ``(width,)``, or the frozen layers' output for them, ``(length,
        dim)``; targets of the same width; and numbers.
    :return: tokens ``(batch, longest)``, or ``(batch, longest, dim)``; targets ``(batch,
        columns)``; and the rest.
    """
    tokens, targets, *rest = (
        default_collate(list(samples))
        if samples[0][0].ndim == 1
        else collate_hidden_states(samples)
    )
    tokens = crop(tokens)
    targets = targets[:, : tokens.shape[1]]
    labelled = (targets != IGNORED).any(0)
    first = int(labelled.int().argmax()) if len(labelled) else 0
    return [tokens.contiguous(), targets[:, first:].contiguous(), *rest]


def prompt_lengths(tokens: Tensor, targets: Tensor) -> Tensor:
    """Returns the number of tokens of each sample's prompt, ``(batch,)``.

    The first target is predicted from the prompt's last token.

    >>> prompt_lengths(torch.tensor([[5, 6, 7, -1]]), torch.tensor([[7, 8, -100]]))
    tensor([2])

    :param tokens: tokens of prompt and answer, ``(batch, length)``.
    :param targets: ``(batch, length)``, or its last columns alone; -100 outside the answer.
    """
    labelled = targets != IGNORED
    first = torch.where(labelled.any(1), labelled.int().argmax(1), targets.shape[1] - 1)
    return first + 1 + tokens.shape[1] - targets.shape[1]


def collate_hidden_states(samples: Sequence[Any], width: int | None = None) -> list[Tensor]:
    """Returns a batch of the frozen layers' outputs for texts, padded with NaN.

    :param samples: tuples of hidden states ``(length, dim)``, targets ``(length,)``, and numbers.
    :param width: number of columns; by default the length of the longest.
    :return: hidden states ``(batch, width, dim)``, targets ``(batch, width)``, and the rest.
    """
    width = max(len(sample[1]) for sample in samples) if width is None else width
    hidden = [F.pad(h, (0, 0, 0, width - len(h)), value=torch.nan) for h, *_ in samples]
    targets = [F.pad(y, (0, width - len(y)), value=IGNORED) for _, y, *_ in samples]
    rest = default_collate([tuple(sample[2:]) for sample in samples]) if samples[0][2:] else []
    return [torch.stack(hidden), torch.stack(targets), *rest]


def token_loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool,
    drop_last: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    """Returns a loader of batches of similar length.

    :param dataset: token sequences with an attribute ``lengths``, as the benchmarks of texts make
        them.
    :param batch_size: samples per batch.
    :param shuffle: whether to shuffle.
    :param drop_last: whether to leave out a batch that is not full.
    :param options: further arguments of the loader.
    """
    sampler = LengthBatchSampler(dataset.lengths, batch_size, shuffle=shuffle, drop_last=drop_last)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_tokens, **options)

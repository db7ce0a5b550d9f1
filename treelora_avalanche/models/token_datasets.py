"""Encoded texts as datasets of Avalanche."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from treelora_avalanche.models.token_loss import IGNORED
from treelora_avalanche.models.tokenization import EncodedSample
from treelora_avalanche.models.tokens import PADDING


class TokenSequences(Dataset[tuple[Tensor, Tensor]]):
    """Samples ``(x, y)`` of one width: tokens without the last, and the answer shifted by one.

    With tokens t_1 ... t_n, of which the first p are the prompt, x_i = t_i for i < n, and
    y_i = t_(i+1) for p <= i < n; all else is padding (-1 in x, -100 in y).

    Example::

        x, y = TokenSequences([EncodedSample([5, 6, 7], n_prompt=2, n_cut=0)], width=4)[0]
        x.tolist()  # [5, 6, -1, -1]
        y.tolist()  # [-100, 7, -100, -100]

    :param samples: the samples.
    :param width: of the padded sequences; at least the number of tokens of any sample.
    """

    def __init__(self, samples: Sequence[EncodedSample], width: int):
        self.samples = [(torch.tensor(s.tokens, dtype=torch.int32), s.n_prompt) for s in samples]
        self.width = width

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, n_prompt = self.samples[index]
        return _padded(tokens, n_prompt, self.width)


def _padded(tokens: Tensor, n_prompt: int, width: int) -> tuple[Tensor, Tensor]:
    x = torch.full((width,), PADDING)
    y = torch.full((width,), IGNORED)
    x[: len(tokens) - 1] = tokens[:-1]
    y[n_prompt - 1 : len(tokens) - 1] = tokens[n_prompt:]
    return x, y


class TokenTargets(DataAttribute):
    """Avalanche's ``targets`` of a dataset: for each sample the token ids of its answer.

    >>> sorted(TokenTargets([(3, 4), (4,)]).uniques)
    [3, 4]

    :param data: for each sample the token ids of its answer.
    :param name: name of the attribute.
    :param use_in_getitem: whether samples contain it.
    """

    def __init__(self, data: Any, name: str = "targets", use_in_getitem: bool = False):
        super().__init__(data, name, use_in_getitem)

    @property
    def uniques(self) -> set[int]:
        """The ids that occur as labels, which LwF reads as the classes seen."""
        return {token for tokens in self.data for token in tokens}

    def subset(self, indices: Any) -> TokenTargets:
        """Returns the targets of some samples.

        :param indices: their positions.
        """
        return TokenTargets(self.data.subset(indices), self.name, self.use_in_getitem)

    def concat(self, other: DataAttribute) -> TokenTargets:
        """Returns the targets of two datasets, one after the other.

        :param other: the targets of the second.
        """
        return TokenTargets(self.data.concat(other.data), self.name, self.use_in_getitem)


def as_avalanche_dataset(
    samples: Sequence[EncodedSample], width: int
) -> TaskAwareSupervisedClassificationDataset:
    """Returns encoded samples as a dataset of Avalanche; the task label is 0 everywhere.

    :param samples: the samples.
    :param width: of the padded sequences; at least the number of tokens of any sample.
    """
    return _with_attributes(TokenSequences(samples, width), samples)


def generated_dataset(
    samples: Sequence[EncodedSample], width: int
) -> TaskAwareSupervisedClassificationDataset:
    """Returns the same for a few samples that are no data of a stream, as padded tensors.

    :param samples: the samples, at least one.
    :param width: see :func:`as_avalanche_dataset`.
    """
    rows = [_padded(torch.tensor(s.tokens), s.n_prompt, width) for s in samples]
    tensors = (torch.stack(column) for column in zip(*rows, strict=True))
    return _with_attributes(TensorDataset(*tensors), samples)


def _with_attributes(
    dataset: Dataset[Any], samples: Sequence[EncodedSample]
) -> TaskAwareSupervisedClassificationDataset:
    return TaskAwareSupervisedClassificationDataset(
        [dataset],
        data_attributes=[
            TokenTargets([tuple(s.tokens[s.n_prompt :]) for s in samples]),
            DataAttribute([len(s.tokens) - 1 for s in samples], "lengths"),
            DataAttribute([0] * len(samples), "targets_task_labels", use_in_getitem=True),
        ],
    )

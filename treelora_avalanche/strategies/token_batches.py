"""Batches of rows of tokens: samples of similar length together, padded to the longest of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from avalanche.training.plugins import LwFPlugin
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from treelora_avalanche.models.language import crop
from treelora_avalanche.models.token_loss import IGNORED

WINDOW = 64
"""Batches whose samples are sorted together: more waste less padding, fewer mix better."""


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of samples of similar length.

    The samples are shuffled, sorted by length within windows of :data:`WINDOW` batches, cut into
    batches, and the batches shuffled; by torch's global generator, so that a seed settles it all.
    Without shuffling the whole is sorted, the longest first.

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
        by_length = self.lengths[samples].argsort(descending=True, stable=True)
        for batch in samples[by_length].split(self.batch_size):
            if not self.drop_last or len(batch) == self.batch_size:
                yield batch.tolist()


def collate_token_rows(samples: Sequence[Any]) -> list[Tensor]:
    """A batch of rows of tokens, without what is padding in all of them.

    The targets keep the last columns alone, from the first that has a target in some row: their
    width tells how many columns of logits are needed.

    :param samples: tuples of tokens ``(width,)``, targets ``(width,)``, and numbers.
    :return: tokens ``(batch, longest)``, targets ``(batch, columns)``, and the rest.
    """
    tokens, targets, *rest = default_collate(list(samples))
    tokens = crop(tokens)
    targets = targets[:, : tokens.shape[1]]
    labelled = (targets != IGNORED).any(0)
    first = int(labelled.int().argmax()) if len(labelled) else 0
    return [tokens.contiguous(), targets[:, first:].contiguous(), *rest]


def token_loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool,
    drop_last: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    """A loader of batches of similar length.

    :param dataset: a dataset of rows of tokens with an attribute ``lengths``, as the benchmarks of
        texts make it.
    :param batch_size: samples per batch.
    :param shuffle: whether to shuffle.
    :param drop_last: whether to leave out a batch that is not full.
    :param options: further arguments of the loader.
    """
    sampler = LengthBatchSampler(dataset.lengths, batch_size, shuffle=shuffle, drop_last=drop_last)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_token_rows, **options)


class TokenBatches:
    """Mixin for strategies: rows of tokens come in batches of similar length.

    Datasets without ``lengths`` are loaded as Avalanche loads them.
    """

    def make_train_dataloader(
        self: Any, shuffle: bool = True, drop_last: bool = False, **kwargs: Any
    ) -> None:
        """The loader of an experience that is trained.

        :param shuffle: whether the samples are shuffled.
        :param drop_last: whether to leave out a batch that is not full.
        :param kwargs: ``num_workers``, ``pin_memory``, ``persistent_workers``.
        """
        if hasattr(self.adapted_dataset, "lengths"):
            self.dataloader = token_loader(
                self.adapted_dataset,
                self.train_mb_size,
                shuffle=shuffle,
                drop_last=drop_last,
                **_loader_options(self, **kwargs),
            )
        else:
            super().make_train_dataloader(  # type: ignore[misc]
                shuffle=shuffle, drop_last=drop_last, **kwargs
            )

    def make_eval_dataloader(self: Any, shuffle: bool = False, **kwargs: Any) -> None:
        """The loader of an experience that is evaluated.

        :param shuffle: whether the samples are shuffled.
        :param kwargs: see :meth:`make_train_dataloader`.
        """
        if hasattr(self.adapted_dataset, "lengths"):
            self.dataloader = token_loader(
                self.adapted_dataset,
                self.eval_mb_size,
                shuffle=shuffle,
                **_loader_options(self, **kwargs),
            )
        else:
            super().make_eval_dataloader(shuffle=shuffle, **kwargs)  # type: ignore[misc]

    def forward(self: Any) -> Any:
        """The answer to the current batch; of a language model, where there are targets alone."""
        x, y = self.mb_x, self.mb_y
        # LwF compares these logits with those of another model for the whole of the batch.
        compared = any(isinstance(plugin, LwFPlugin) for plugin in self.plugins)
        if y.ndim == 2 and y.shape[1] < x.shape[1] and not compared:
            return self.model(x, last=y.shape[1])
        return super().forward()  # type: ignore[misc]


def _loader_options(
    strategy: Any,
    num_workers: int = 0,
    pin_memory: bool | None = None,
    persistent_workers: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """As in Avalanche: pinned on a GPU, and workers persist only where there are some."""
    options: dict[str, Any] = strategy._obtain_common_dataloader_parameters(
        num_workers=num_workers, pin_memory=pin_memory, persistent_workers=persistent_workers
    )
    return options

"""Train one model with several processes, each on its part of every batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import synchronize_rng_states
from avalanche.benchmarks.utils.data_loader import MultiDatasetDataLoader
from avalanche.training.plugins import SupervisedPlugin
from torch import distributed
from torch.utils.data import DataLoader

IGNORED_TARGET = -100  # PyTorch's `ignore_index`


class PartOfBatches:
    """Batches of indices, of each the part of one process.

    :param batches: the indices of each batch, the same in every process.
    :param rank: number of this process.
    :param n_processes: number of processes.
    """

    def __init__(self, batches: Any, rank: int, n_processes: int):
        self.batches = batches
        self.rank = rank
        self.n_processes = n_processes
        self.is_empty: list[bool] = []
        """Of each batch of the epoch, whether it has nothing for this process."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        parts = [batch[self.rank :: self.n_processes] for batch in self.batches]
        self.is_empty = [not part for part in parts]
        # An empty part is a sample that does not count: all processes take as many steps.
        yield from (part or [0] for part in parts)


class PartLoader:
    """What a loader loads, of each batch the part of one process.

    :param loader: one of Avalanche's, or of torch's.
    :param rank: number of this process.
    :param n_processes: number of processes.
    """

    def __init__(self, loader: Any, rank: int, n_processes: int):
        whole_batches(loader)
        self.loader = loader
        self.parts = PartOfBatches(self._loader().batch_sampler, rank, n_processes)

    def _loader(self) -> DataLoader[Any]:
        # Avalanche's loaders make a new one of torch's for every epoch.
        is_avalanches = isinstance(self.loader, MultiDatasetDataLoader)
        return self.loader._get_loader() if is_avalanches else self.loader

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Any]:
        whole = self._loader()
        self.parts.batches = whole.batch_sampler
        batch_sampler: Iterable[list[int]] = self.parts
        yield from DataLoader(
            whole.dataset,
            batch_sampler=batch_sampler,
            collate_fn=whole.collate_fn,
            num_workers=whole.num_workers,
            pin_memory=whole.pin_memory,
        )


def whole_batches(loader: Any) -> None:
    """Keeps Avalanche from dividing a loader's data itself, with repeated samples at the end.

    :param loader: any loader.
    """
    if isinstance(loader, MultiDatasetDataLoader):
        loader.distributed_sampling = False


class DataParallelPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Divides every batch among the processes, and adds up the gradients of its parts.

    What the processes compute together is what one process computes with the whole batch, so the
    strategy's batch size is that of all of them. Before an experience they take over the trained
    weights and the random state of the first one; gradients are averaged as soon as they are there,
    before any other plugin sees them, by one exchange of an adapter's size. From then on all have
    the same weights, and so the same signatures, bandit statistics, tree and bank.

    Why not :class:`torch.nn.parallel.DistributedDataParallel`: it overlaps the exchange of a large
    model's gradients with the backward pass, for which it must own every forward pass; but an
    adapter is exchanged in one message, and GEM, OGD or class statistics pass through the model in
    ways of their own. These, and evaluation, every process does on all the data.

    Works with any strategy whose model learns by gradients. Put it before all other plugins, and
    start the processes with ``torchrun`` or ``accelerate launch``. Task labels are not used.

    :param accelerator: the processes, as accelerate has started them.
    """

    def __init__(self, accelerator: Accelerator):
        super().__init__()
        self.accelerator = accelerator

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Makes the processes alike, and gives each its part of the batches."""
        for parameter in strategy.model.parameters():
            distributed.broadcast(parameter.detach(), src=0)
        strategy.dataloader = PartLoader(
            strategy.dataloader, self.accelerator.process_index, self.accelerator.num_processes
        )

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Makes the processes shuffle alike."""
        synchronize_rng_states(["torch"])

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replaces the gradients of the parts by that of the whole batch."""
        parameters = [p for p in strategy.model.parameters() if p.grad is not None]
        # The loss is a mean over targets, so a part with more of them weighs more.
        weight = (strategy.mb_y != IGNORED_TARGET).sum()
        if strategy.dataloader.parts.is_empty[strategy.clock.train_epoch_iterations]:
            weight = torch.zeros_like(weight)
        gradients = [p.grad.flatten() for p in parameters]
        message = torch.cat([*gradients, torch.ones_like(gradients[0][:1])]) * weight
        distributed.all_reduce(message)
        summed = message[:-1] / message[-1]
        for p, gradient in zip(
            parameters, summed.split([g.numel() for g in gradients]), strict=True
        ):
            p.grad = gradient.view_as(p)

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Every process evaluates on everything, so the metrics of each are those of all."""
        whole_batches(strategy.dataloader)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing.

        :param state: what :meth:`state_dict` returned.
        """

"""Trains one model with several processes, each on its part of every batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import synchronize_rng_states
from avalanche.benchmarks.utils.data_loader import MultiDatasetDataLoader
from avalanche.training.plugins import SupervisedPlugin
from torch import distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from treelora_avalanche.adapters import find_host
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.views.split_language import decoder_layers
from treelora_avalanche.models.views.split_vit import find_transformer
from treelora_avalanche.processes import Processes, shared_work, whole_batches

IGNORED_TARGET = -100  # PyTorch's `ignore_index`


class PartOfBatches:
    """Batch sampler: of each batch, the part of one process.

    >>> list(PartOfBatches([[0, 1, 2]], rank=1, n_processes=2))
    [[1]]

    :param batches: the indices of each batch, the same in every process.
    :param rank: number of this process.
    :param n_processes: number of processes.
    """

    def __init__(self, batches: Any, rank: int, n_processes: int):
        self.batches = batches
        self.rank = rank
        self.n_processes = n_processes
        self.is_empty: list[bool] = []
        """For each batch of the epoch, whether the part of this process is empty."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        parts = [batch[self.rank :: self.n_processes] for batch in self.batches]
        self.is_empty = [not part for part in parts]
        # An empty part becomes a sample of weight 0, so that all processes take equally many steps.
        yield from (part or [0] for part in parts)


class PartLoader:
    """Data loader: of each batch, the part of one process. Example::

        strategy.dataloader = PartLoader(strategy.dataloader, rank=0, n_processes=2)

    :param loader: a loader of Avalanche or of torch.
    :param rank: number of this process.
    :param n_processes: number of processes.
    """

    def __init__(self, loader: Any, rank: int, n_processes: int):
        whole_batches(loader)
        self.loader = loader
        self.parts = PartOfBatches(self._loader().batch_sampler, rank, n_processes)

    def _loader(self) -> DataLoader[Any]:
        # Avalanche's loaders make a new torch loader for every epoch.
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


class DataParallelPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Divides every batch among processes, and sums the gradients of the parts.

    The result is that of one process with the whole batch, so the strategy's batch size is the
    total. Before an experience all processes take the weights and the random state of the first.
    Gradients are averaged right after the backward pass, before any other plugin reads them, in one
    message of an adapter's size. All processes then have the same weights, and so the same
    signatures, bandit statistics, tree and bank.

    Evaluation of classifiers is divided too: every process passes a part of each batch through the
    model, and all get the logits of the whole. So are text generation, features for class
    statistics, and the activation cache, which the processes of one machine share. Not divided are
    the evaluation losses of texts, whose logits are large, and the passes of GEM, OGD, InfLoRA and
    routers.

    Why not :class:`torch.nn.parallel.DistributedDataParallel`: it overlaps the exchange of a large
    model's gradients with the backward pass, and therefore owns every forward pass; an adapter fits
    into one message, and GEM, OGD and class statistics run forward passes of their own.

    Works with any strategy whose model learns by gradients. It must come before all other plugins,
    which the strategies with LoRA ensure; start the processes with ``torchrun`` or ``accelerate
    launch``. Task labels are not used. Example::

        strategy = SeqLoRA(model, plugins=[DataParallelPlugin(Accelerator())])

    :param accelerator: the processes, started by accelerate.
    :param shard_backbone: whether each process holds a part of the frozen weights of every block,
        by PyTorch's FSDP2 (:func:`torch.distributed.fsdp.fully_shard`), for models that do not fit.
        The weights of a block are gathered while it computes. Trainable parameters, embeddings and
        output layer stay whole in every process. Passes without gradients are then not divided.
    """

    def __init__(self, accelerator: Accelerator, *, shard_backbone: bool = False):
        super().__init__()
        self.accelerator = accelerator
        self.shard_backbone = shard_backbone
        self._is_sharded = False
        self.processes = Processes(accelerator)

    def shard(self, model: nn.Module, device: torch.device | str) -> None:
        """Shards the frozen weights if ``shard_backbone`` is set. A strategy calls it before
        anything else.

        :param model: a model with LoRA, on any device.
        :param device: the device of the training.
        :raises ValueError: if its blocks are unknown.
        """
        if not self.shard_backbone:
            return
        host, vit = find_host(model), find_transformer(model)
        layers: Iterable[nn.Module] | None = None if vit is None else vit.blocks
        if isinstance(host, LanguageModel):
            layers = decoder_layers(host)
        if layers is None:
            raise ValueError(
                f"`shard_backbone` should be False for {type(model).__name__}, whose blocks are "
                "not known, but is True. Use a vision transformer of timm or a causal language "
                "model of transformers, or shard_backbone=False."
            )
        self._is_sharded = True
        n = self.accelerator.num_processes
        mesh = init_device_mesh(torch.device(device).type, (n,))
        for block in layers:  # each alone: views call blocks, not always the model
            trained = {p for p in block.parameters() if p.requires_grad}
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)

    @property
    def shared_processes(self) -> Processes | None:
        """Returns the processes that divide passes without gradients; None if they do not."""
        # Sharded weights are gathered in every pass, so all processes must run the same passes.
        return None if self.shard_backbone else self.processes

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Synchronises the processes, and gives each its part of the batches."""
        if self.shard_backbone and not self._is_sharded:
            raise ValueError(
                f"`shard_backbone` should be False for {type(strategy).__name__}, which does not "
                "call `DataParallelPlugin.shard`, but is True. Use one of this library's "
                "strategies with LoRA."
            )
        for parameter in strategy.model.parameters():
            distributed.broadcast(parameter.detach(), src=0)
        strategy.dataloader = PartLoader(
            strategy.dataloader, self.accelerator.process_index, self.accelerator.num_processes
        )

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Synchronises the shuffling of the processes."""
        synchronize_rng_states(["torch"])

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replaces the gradients of the parts by that of the whole batch."""
        parameters = [p for p in strategy.model.parameters() if p.grad is not None]
        # The loss is a mean over targets: a part is weighted by its number of targets.
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
        """Lets every process load all data, so that its metrics cover all data."""
        whole_batches(strategy.dataloader)

    def before_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Restricts the batch to the part of this process."""
        self._batch = None
        processes = shared_work(strategy)
        if processes is not None and strategy.mb_y.ndim == 1:
            self._batch = strategy.mbatch
            rows = processes.part(len(strategy.mb_y))
            strategy.mbatch = [values[rows] for values in strategy.mbatch]

    def after_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Gathers the logits of the whole batch."""
        if self._batch is not None:
            strategy.mbatch, self._batch = self._batch, None
            strategy.mb_output = self.processes.whole(strategy.mb_output, len(strategy.mb_y))

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing.

        :param state: what :meth:`state_dict` returned.
        """

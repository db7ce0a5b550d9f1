"""Train one model with several processes, each on its part of every batch."""

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


class DataParallelPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Divides every batch among the processes, and adds up the gradients of its parts.

    What the processes compute together is what one process computes with the whole batch, so the
    strategy's batch size is that of all of them. Before an experience they take over the trained
    weights and the random state of the first one; gradients are averaged as soon as they are there,
    before any other plugin sees them, by one exchange of an adapter's size. From then on all have
    the same weights, and so the same signatures, bandit statistics, tree and bank.

    Classes are told in the same way: every process passes a part of each batch that is evaluated
    through the model, and all see the logits of the whole. So are answers generated, features taken
    for class statistics, and the cache of frozen blocks filled, which the processes of one machine
    have in common. The losses of texts in evaluation, whose logits are large, and the passes of
    GEM, OGD, InfLoRA and routers every process computes on all the data.

    Why not :class:`torch.nn.parallel.DistributedDataParallel`: it overlaps the exchange of a large
    model's gradients with the backward pass, for which it must own every forward pass; but an
    adapter is exchanged in one message, and GEM, OGD or class statistics pass through the model in
    ways of their own.

    Works with any strategy whose model learns by gradients. It must come before all other plugins,
    which the strategies with LoRA see to; start the processes with ``torchrun`` or ``accelerate
    launch``. Task labels are not used.

    :param accelerator: the processes, as accelerate has started them.
    :param shard_backbone: whether each process holds a part of the frozen weights of every block,
        by PyTorch's FSDP2 (:func:`torch.distributed.fsdp.fully_shard`): for models that do not fit.
        A block's weights come together while it computes. What is trained, embeddings and output
        layer every process has whole. Passes without gradients are not divided then.
    """

    def __init__(self, accelerator: Accelerator, *, shard_backbone: bool = False):
        super().__init__()
        self.accelerator = accelerator
        self.shard_backbone = shard_backbone
        self._is_sharded = False
        self.processes = Processes(accelerator)

    def shard(self, model: nn.Module, device: torch.device | str) -> None:
        """Divides the frozen weights, if that is wanted. A strategy calls it before all else.

        :param model: a model with LoRA, on whatever device.
        :param device: where it is to be trained.
        :raises ValueError: if its blocks are not known.
        """
        if not self.shard_backbone:
            return
        host, vit = find_host(model), find_transformer(model)
        layers: Iterable[nn.Module] | None = None if vit is None else vit.blocks
        if isinstance(host, LanguageModel):
            layers = decoder_layers(host)
        if layers is None:
            raise ValueError(
                f"`shard_backbone` is True, and the blocks of {type(model).__name__} are not "
                "known; use a vision transformer of timm or a causal language model of "
                "transformers, or shard_backbone=False."
            )
        self._is_sharded = True
        n = self.accelerator.num_processes
        mesh = init_device_mesh(torch.device(device).type, (n,))
        for block in layers:  # each by itself: views call blocks, and not always the model
            trained = {p for p in block.parameters() if p.requires_grad}
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)

    @property
    def shared_processes(self) -> Processes | None:
        """The processes that divide passes without gradients; None if each makes all of them."""
        # Sharded weights come together in every pass, so that all have to make the same passes.
        return None if self.shard_backbone else self.processes

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Makes the processes alike, and gives each its part of the batches."""
        if self.shard_backbone and not self._is_sharded:
            raise ValueError(
                f"`shard_backbone` is True, and {type(strategy).__name__} does not call "
                "`DataParallelPlugin.shard`; the strategies with LoRA do."
            )
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
        """Lets every process load everything, so the metrics of each are those of all."""
        whole_batches(strategy.dataloader)

    def before_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Narrows the batch to the part of this process."""
        self._batch = None
        processes = shared_work(strategy)
        if processes is not None and strategy.mb_y.ndim == 1:
            self._batch = strategy.mbatch
            rows = processes.part(len(strategy.mb_y))
            strategy.mbatch = [values[rows] for values in strategy.mbatch]

    def after_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Brings the logits of the whole batch together."""
        if self._batch is not None:
            strategy.mbatch, self._batch = self._batch, None
            strategy.mb_output = self.processes.whole(strategy.mb_output, len(strategy.mb_y))

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing.

        :param state: what :meth:`state_dict` returned.
        """

"""Starts a new task from the adapter of the most similar past one."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.models.features.signature import activation_signature, stack_samples
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys, check_same_settings, reset_optimizer_state
from treelora_avalanche.tree import AdapterTree


class TaskStartPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Starts an experience from the adapter of the past task with the nearest signature.

    Before the first step some samples of the experience pass through the frozen backbone, one batch
    without gradients; the inputs of the adapted layers give the signature of the experience
    (:func:`~treelora_avalanche.models.features.signature.activation_signature`). Training starts at
    the adapter of ``argmin_k Σ_l ‖s^l − s_k^l‖_1``. A task that returns thus starts from its own
    adapter (``benchmarks/transfer.py``).

    For strategies that keep learned adapters apart from the active one: with a
    :class:`~treelora_avalanche.plugins.MergedAdapterPlugin` or a router. Where predictions use only
    the active adapter, starting from an older one discards what was learned since. The adapter
    moves before the first epoch: in ``before_training_exp`` other plugins still see the previous
    one. Draws no global random numbers. In an online stream the task starts, and its signature is
    computed, at its first part. Task labels are not used. Example::

        plugins = [TreeBuilderPlugin(tree, bank), TaskStartPlugin(tree, bank), RouterPlugin(tree)]

    :param tree: the tree that maps an experience to its adapter.
    :param bank: the bank of finished adapters; a
        :class:`~treelora_avalanche.plugins.TreeBuilderPlugin` fills both.
    :param n_samples: number of training samples in the signature, at most.
    :param seed: seed of their choice.
    :raises ValueError: if ``n_samples`` is below 1.
    """

    requires_whole_adapter: str | None = "starts an experience from the whole adapter of a past one"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(self, tree: AdapterTree, bank: AdapterBank, n_samples: int = 64, seed: int = 0):
        super().__init__()
        if n_samples < 1:
            raise ValueError(
                f"`n_samples` should be at least 1, but is {n_samples}. Pass the size of a batch."
            )
        self.tree = tree
        self.bank = bank
        self.n_samples = n_samples
        self.seed = seed
        self.signatures: list[Tensor] = []
        """Signatures of the experiences so far, ``(n_layers, dim)`` each."""
        self.starts: list[int | None] = []
        """For each experience the one whose adapter it started from; None for the first."""
        self._parts = TaskParts()
        self._continues = False

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Computes the signature of the experience, unless it continues a task."""
        self._continues = self._parts.continues(strategy.experience)
        if self._continues:
            return
        dataset = strategy.experience.dataset.eval()
        seed = self.seed + strategy.clock.train_exp_counter
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(dataset), generator=generator)[: self.n_samples].tolist()
        samples, _ = stack_samples(dataset, rows)
        self._signature = activation_signature(strategy.model, samples.to(strategy.device)).cpu()

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Copies the adapter of the nearest task, before the first epoch."""
        if strategy.clock.train_exp_epochs > 0 or self._continues:
            return
        nearest = self.nearest(self._signature) if self.signatures else None
        self.starts.append(nearest)
        if nearest is not None:
            factors = LoRAFactors(strategy.model)
            factors.stack.copy_(self.bank[self.tree.adapter_of_task[nearest]])
            # The optimizer's moments belong to the previous adapter.
            reset_optimizer_state(strategy.optimizer, chain.from_iterable(factors.parameters))

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stores the signature."""
        if not self._continues:
            self.signatures.append(self._signature)
        self._parts.finish(strategy.experience)

    def nearest(self, signature: Tensor) -> int:
        """Returns the past experience with the nearest signature.

        :param signature: ``(n_layers, dim)``, on the CPU.
        """
        return int((torch.stack(self.signatures) - signature).abs().sum((1, 2)).argmin())

    def state_dict(self) -> dict[str, Any]:
        """Returns the signatures, the starts of the experiences, and the arguments."""
        return {
            "signatures": list(self.signatures),
            "starts": list(self.starts),
            "n_samples": self.n_samples,
            "seed": self.seed,
            "task": self._parts.task,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if its arguments differ.
        """
        keys = {"signatures", "starts", "n_samples", "seed", "task"}
        check_keys(state, keys, "the state of TaskStartPlugin")
        check_same_settings(state, {"n_samples": self.n_samples, "seed": self.seed})
        self.signatures, self.starts = list(state["signatures"]), list(state["starts"])
        self._parts.task = state["task"]

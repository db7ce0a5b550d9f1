"""Begin a new task at the adapter of the most similar past one."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.models.features.signature import activation_signature, stack_samples
from treelora_avalanche.state import check_keys, check_same_settings, reset_optimizer_state
from treelora_avalanche.tree import AdapterTree


class TaskStartPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Begins an experience at the adapter of the past task that looks most like it.

    Before the first step some samples of the experience pass through the frozen backbone, one batch
    without gradients; what enters the adapted layers is the experience's signature
    (:func:`~treelora_avalanche.models.features.signature.activation_signature`). The past task
    whose signature has the smallest L1 distance in the sum over layers is where the training
    begins. A task that returns so takes up its own adapter (``benchmarks/transfer.py``).

    It is for strategies that keep what was learned apart from the live adapter: with a
    :class:`~treelora_avalanche.plugins.MergedAdapterPlugin` or a router. Where the live adapter
    alone answers, a start from an older one forgets what was learned in between. The adapter moves
    at the first epoch: other plugins still see it as it answers in ``before_training_exp``. Draws
    no global random numbers. Task labels are not used.

    :param tree: the tree that knows which adapter stands for an experience.
    :param bank: the bank of finished adapters; a
        :class:`~treelora_avalanche.plugins.TreeBuilderPlugin` fills both.
    :param n_samples: training samples that are looked at, at most.
    :param seed: seed of their choice.
    :raises ValueError: if ``n_samples`` is below 1.
    """

    requires_whole_adapter: str | None = "starts an experience from the whole adapter of a past one"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(self, tree: AdapterTree, bank: AdapterBank, n_samples: int = 64, seed: int = 0):
        super().__init__()
        if n_samples < 1:
            raise ValueError(f"`n_samples` must be at least 1, and is {n_samples}.")
        self.tree = tree
        self.bank = bank
        self.n_samples = n_samples
        self.seed = seed
        self.signatures: list[Tensor] = []
        """Of the experiences learned so far, ``(n_layers, dim)`` each."""
        self.starts: list[int | None] = []
        """For each experience the one at whose adapter it began; None for the first."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Takes the signature of the experience."""
        dataset = strategy.experience.dataset.eval()
        seed = self.seed + strategy.clock.train_exp_counter
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(dataset), generator=generator)[: self.n_samples].tolist()
        samples, _ = stack_samples(dataset, rows)
        self._signature = activation_signature(strategy.model, samples.to(strategy.device)).cpu()

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Goes to the start."""
        if strategy.clock.train_exp_epochs > 0:
            return
        nearest = self.nearest(self._signature) if self.signatures else None
        self.starts.append(nearest)
        if nearest is not None:
            factors = LoRAFactors(strategy.model)
            factors.stack.copy_(self.bank[self.tree.adapter_of_task[nearest]])
            # What the optimizer has gathered led to where the adapter was.
            reset_optimizer_state(strategy.optimizer, chain.from_iterable(factors.parameters))

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Files the signature."""
        self.signatures.append(self._signature)

    def nearest(self, signature: Tensor) -> int:
        """The past experience whose signature is nearest.

        :param signature: ``(n_layers, dim)``, on the CPU.
        """
        return int((torch.stack(self.signatures) - signature).abs().sum((1, 2)).argmin())

    def state_dict(self) -> dict[str, Any]:
        """The signatures so far, where the experiences began, and how signatures are taken."""
        return {
            "signatures": list(self.signatures),
            "starts": list(self.starts),
            "n_samples": self.n_samples,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where another plugin of this class has ended.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if its signatures are taken in another way.
        """
        keys = {"signatures", "starts", "n_samples", "seed"}
        check_keys(state, keys, "the state of TaskStartPlugin")
        check_same_settings(state, {"n_samples": self.n_samples, "seed": self.seed})
        self.signatures, self.starts = list(state["signatures"]), list(state["starts"])

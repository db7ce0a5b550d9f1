"""Begin a new task at the adapter of the most similar past task, where that helps."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.models.activations import (
    activation_signature,
    features_of,
    nearest_to_own_class,
    stack_samples,
)
from treelora_avalanche.state import check_keys
from treelora_avalanche.tree import AdapterTree


class TaskSignaturePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Looks at some samples of a new experience through the frozen backbone, before the first step.

    Costs one batch without gradients per experience. Draws no global random numbers. Task labels
    are not used.

    :param n_samples: training samples that are looked at, at most.
    :param seed: seed of the choice of the samples.
    :raises ValueError: if ``n_samples`` is below 1.
    """

    signature: Tensor
    """Signature of the current experience, ``(n_layers, dim)``, see
    :func:`~treelora_avalanche.models.activations.activation_signature`."""
    inputs: Tensor
    """The samples that were looked at, ``(n_samples, ...)``, on the device, during training."""
    targets: Tensor
    """Their targets."""

    def __init__(self, n_samples: int = 64, seed: int = 0):
        super().__init__()
        if n_samples < 1:
            raise ValueError(f"`n_samples` must be at least 1, and is {n_samples}.")
        self.n_samples = n_samples
        self.seed = seed

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Takes the signature of the experience."""
        dataset = strategy.experience.dataset.eval()
        seed = self.seed + strategy.clock.train_exp_counter
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(dataset), generator=generator)[: self.n_samples].tolist()
        self.inputs, self.targets = (
            part.to(strategy.device) for part in stack_samples(dataset, rows)
        )
        self.signature = activation_signature(strategy.model, self.inputs)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Lets go of the samples."""
        del self.inputs, self.targets

    def state_dict(self) -> dict[str, Any]:
        """What the signatures of a stream must have in common."""
        return {"n_samples": self.n_samples, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that signatures are taken in the same way; there is nothing to load.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if they are not.
        """
        check_keys(state, {"n_samples", "seed"}, "the state of TaskSignaturePlugin")
        for name, value in state.items():
            if value != getattr(self, name):
                raise ValueError(
                    f"`{name}` is {value} in the state, and {getattr(self, name)} here; make it "
                    f"with {name}={value} to continue."
                )


class TaskStartPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Begins an experience at the adapter of the nearest past task, if that beats the live one.

    The nearest task is that whose signature has the smallest L1 distance in the sum over layers.
    Whether its adapter is the better start is asked of the samples that the signature was taken of:
    in the features under the one adapter and under the other, which are nearest to the mean of
    their own class (:func:`~treelora_avalanche.models.activations.nearest_to_own_class`)? Those
    that only the past adapter tells right must outnumber those that only the live one does by more
    than a standard error of the difference; else the training goes on from where it stands. Costs
    two batches without gradients per experience. With the live adapter alone at inference, a start
    from an older one forgets what was learned in between: it is for strategies that keep the
    adapter of every task. Task labels are not used.

    :param signature: the plugin that takes the signatures; before this one among the plugins.
    :param tree: the tree of the same signatures.
    :param bank: the bank of finished adapters.
    """

    def __init__(self, signature: TaskSignaturePlugin, tree: AdapterTree, bank: AdapterBank):
        super().__init__()
        self.signature = signature
        self.tree = tree
        self.bank = bank
        self.starts: list[int | None] = []
        """For each experience the adapter, by its index at that time, at which it began; None where
        it went on from where the one before had ended."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Chooses the start; before any plugin that takes note of where the adapter starts."""
        adapter = self.nearest(self.signature.signature.cpu()) if len(self.bank) else None
        if adapter is not None and not self._move(strategy, self.bank[adapter]):
            adapter = None
        self.starts.append(adapter)

    def nearest(self, signature: Tensor) -> int:
        """The past task whose signature is nearest.

        :param signature: ``(n_layers, dim)``, on the CPU.
        :return: index of its adapter.
        """
        return int((self.tree.signatures - signature).abs().sum((1, 2)).argmin())

    def _move(self, strategy: Any, start: Tensor) -> bool:
        """Goes to the start if it is clearly better than the live adapter."""
        factors = LoRAFactors(strategy.model)
        live, by_live = factors.stack.clone(), self._told_right(strategy.model)
        factors.stack.copy_(start)
        by_past = self._told_right(strategy.model)
        if not clearly_better(by_past, by_live):
            factors.stack.copy_(live)
            return False
        for pair in factors.parameters:  # what the optimizer has gathered led to the live adapter
            for parameter in pair:
                strategy.optimizer.state.pop(parameter, None)
        return True

    def _told_right(self, model: Any) -> Tensor:
        features = features_of(model, self.signature.inputs)
        return nearest_to_own_class(features, self.signature.targets)

    def state_dict(self) -> dict[str, Any]:
        """Where the experiences so far began."""
        return {"starts": list(self.starts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where another plugin of this class has ended.

        :param state: what :meth:`state_dict` returned.
        """
        check_keys(state, {"starts"}, "the state of TaskStartPlugin")
        self.starts = list(state["starts"])


def clearly_better(candidate: Tensor, other: Tensor) -> bool:
    """Whether one of two is right more often, by more than a standard error of the difference.

    The comparison is paired, as McNemar's test: samples on which both agree say nothing.

    :param candidate: on which samples the candidate is right, ``(n_samples,)``, bool.
    :param other: on which samples the other is.
    """
    gained, lost = int((candidate & ~other).sum()), int((other & ~candidate).sum())
    return gained - lost > (gained + lost) ** 0.5

"""Contrastive regularisation and one adapter per task: the training part of HiDe.

HiDe-Prompt (Wang et al., NeurIPS 2023, arXiv 2310.07234) and HiDe-PET (Wang et al. 2024,
arXiv 2407.05229). The other steps have plugins of their own: task-identity inference is the
:class:`~treelora_avalanche.plugins.RouterPlugin`, task-adaptive prediction the
:class:`~treelora_avalanche.plugins.TrainedHeadPlugin`, both with centroids.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from torch.nn import functional as F

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.models.features.centroids import Centroids
from treelora_avalanche.plugins.router import RouterPlugin
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.plugins.trained_head import TrainedHeadPlugin
from treelora_avalanche.state import check_keys, check_same_settings, reset_optimizer_state


def contrastive_regularisation(features: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    """Returns the mean of ``log softmax(h · μ / τ)`` over features h and centroids μ of past
    classes.

    The softmax runs over all centroids and all features of the batch. Minimising it moves the
    features away from past classes.

    :param features: unit vectors h, ``(batch, dim)``.
    :param centroids: unit vectors μ, ``(n_centroids, dim)``.
    :param temperature: τ.
    :return: a scalar, below 0.
    """
    scores = features @ torch.cat((centroids, features)).T / temperature
    return scores.log_softmax(1)[:, : len(centroids)].mean()


class ContrastivePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Moves the features of a new task away from the centroids of past classes, from the second
    task on.

    Adds ``contrast`` times :func:`contrastive_regularisation` to the loss. Features and centroids
    are normalised to unit length first, which the paper does not state: features of a vision
    transformer have norms of several tens, so the softmax would see only each feature's product
    with itself, and no gradient would be left. Stores nothing of its own; its cost grows with the
    number of past classes. Task labels are not used. Example::

        head = TrainedHeadPlugin(kind=Centroids(10))
        plugins = [head, ContrastivePlugin(head)]

    :param head: the plugin that stores the centroids.
    :param contrast: strength λ; 0.1 in the paper.
    :param temperature: τ; 0.8 in the paper.
    :raises ValueError: if ``contrast`` is negative, or ``temperature`` not positive.
    """

    def __init__(self, head: TrainedHeadPlugin, contrast: float = 0.1, temperature: float = 0.8):
        super().__init__()
        if not contrast >= 0:
            raise ValueError(
                f"`contrast` should be at least 0, but is {contrast}. Use 0 for no penalty."
            )
        if not temperature > 0:
            raise ValueError(
                f"`temperature` should be above 0, but is {temperature}. The paper's is 0.8."
            )
        self.head = head
        self.contrast = contrast
        self.temperature = temperature
        self._centroids: Tensor | None = None
        self._hook: Any = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Collects the centroids of past classes, and hooks the inputs of the classifier."""
        self._remove_hook()
        past = self.head.past_statistics()
        if past:
            means = torch.cat([s.means for s in past])
            self._centroids = F.normalize(means.to(strategy.device), dim=1)
            self._hook = classifier_of(strategy.model).register_forward_pre_hook(self._record)

    def _record(self, classifier: Any, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def penalty(self) -> Tensor:
        """Returns the penalty of the last batch, a scalar with a gradient to its features.

        :raises RuntimeError: outside the training of an experience, and in the first.
        """
        if self._centroids is None:
            raise RuntimeError("the penalty needs past classes. Train a second experience.")
        features = F.normalize(self._features, dim=1)
        return self.contrast * contrastive_regularisation(
            features, self._centroids, self.temperature
        )

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the penalty to the loss."""
        if self._centroids is not None:
            strategy.loss = strategy.loss + self.penalty()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Removes the hook."""
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            del self._features
        self._hook = self._centroids = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the arguments, so that a stream is not continued with others."""
        return {"contrast": float(self.contrast), "temperature": float(self.temperature)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the arguments are the same; nothing is loaded.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if one differs.
        """
        check_keys(state, {"contrast", "temperature"}, "the state of ContrastivePlugin")
        check_same_settings(state, {"contrast": self.contrast, "temperature": self.temperature})


class TaskAdaptersPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Stores a copy of the LoRA adapter of every task; only keys and values are adapted.

    A task starts from the adapter of the previous one, with a new optimizer state. In a fused
    ``qkv`` the rows of B that would change the queries are held at zero: one operation for all
    layers per step. Stores one adapter per task, on the host; in an online stream the parts of a
    task share it. Works with any strategy whose model
    carries LoRA. Task labels are not used. Example::

        bank = AdapterBank()
        strategy = Naive(RoutedAdapters(model, bank), plugins=[TaskAdaptersPlugin(bank)])

    :param bank: the bank of finished adapters.
    """

    requires_whole_adapter: str | None = "stores a whole adapter per experience"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(self, bank: AdapterBank):
        super().__init__()
        self.bank = bank
        self._parts = TaskParts()
        self._continues = False

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Finds the active adapter and the part of it that changes queries."""
        self._factors = LoRAFactors(strategy.model)
        self._queries = torch.zeros_like(self._factors.stack, dtype=torch.bool)
        for row, name, shape in zip(
            self._queries, self._factors.names, self._factors.shapes, strict=True
        ):
            if name.endswith("qkv"):
                _, b = shape.split(row)
                b[: shape.n_out // 3] = True
        self._continues = self._parts.continues(strategy.experience)
        if len(self.bank) and not self._continues:
            reset_optimizer_state(strategy.optimizer, chain.from_iterable(self._factors.parameters))

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Sets the part that changes queries back to zero."""
        self._factors.stack.masked_fill_(self._queries, 0)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stores the adapter in the bank."""
        if self._continues:
            self.bank.factors[-1] = self._factors.stack.detach()
        else:
            self.bank.append(self._factors)
        self._parts.finish(strategy.experience)

    def state_dict(self) -> dict[str, Any]:
        """Returns the bank."""
        return {"bank": self.bank.state_dict(), "task": self._parts.task}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the bank into the object that the view shares.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; the bank is then unchanged.
        """
        check_keys(state, {"bank", "task"}, "the state of TaskAdaptersPlugin")
        self.bank.load_state_dict(state["bank"])
        self._parts.task = state["task"]


def hide_plugins(
    contrast: float, n_centroids: int, seed: int, temperature: float = 0.8
) -> tuple[TrainedHeadPlugin, ContrastivePlugin, RouterPlugin]:
    """Returns the parts of HiDe that prompts and LoRA share.

    :param contrast: see :class:`ContrastivePlugin`.
    :param n_centroids: centroids per class, of adapted and of frozen features.
    :param seed: seed of the pseudo-features.
    :param temperature: see :class:`ContrastivePlugin`.
    :return: task-adaptive prediction, contrastive regularisation, task-identity inference.
    :raises ValueError: if an argument is out of range.
    """
    kind = Centroids(n_centroids)
    head = TrainedHeadPlugin(kind=kind, seed=seed)
    contrastive = ContrastivePlugin(head, contrast, temperature)
    return head, contrastive, RouterPlugin(seed=seed, kind=kind)

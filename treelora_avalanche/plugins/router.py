"""Fits the router that selects an adapter per sample (task-identity inference)."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.experiences import samples_of
from treelora_avalanche.models.features.gaussians import (
    Gaussians,
    StatisticsKind,
    move_statistics,
    statistics_state,
    train_head,
)
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel
from treelora_avalanche.models.views.router import RoutedView, Router
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys
from treelora_avalanche.tree import AdapterTree


class RouterPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Fits the router of a :class:`~treelora_avalanche.models.views.router.RoutedView`.

    The router classifies features of the frozen backbone, which never drift, by the classes of each
    task (task-identity inference, HiDe); all texts of a task count as one class. It is trained like
    the head, on pseudo-features; no image is stored. Costs one pass through the frozen backbone per
    experience, and stores per class what ``kind`` defines. In an online stream the parts of a task
    are one task. Task labels are not used. Example::

        view = RoutedAdapters(model, bank)
        strategy = Naive(view, plugins=[TaskAdaptersPlugin(bank), RouterPlugin()])

    :param tree: the tree that maps a task to its adapter; its
        :class:`~treelora_avalanche.plugins.TreeBuilderPlugin` must come before this plugin. None:
        every task has an adapter, or a prompt, of its own.
    :param seed: seed of the pseudo-features.
    :param kind: the statistics of a class, see :class:`TaskAdaptiveHeadPlugin`.
    """

    requires_whole_adapter: str | None = "predicts with a whole adapter per task"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(
        self, tree: AdapterTree | None = None, seed: int = 0, kind: StatisticsKind | None = None
    ):
        super().__init__()
        self.tree = tree
        self.seed = seed
        self.kind: StatisticsKind = Gaussians() if kind is None else kind
        self.statistics: list[Any] = []
        self._parts = TaskParts()
        self._continues = False

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Routes to the tasks before, if this is a further part of a task.

        A tree holds only those while the part is trained.
        """
        self._continues = self._parts.continues(strategy.experience)
        if self._continues:
            task = self.statistics[-1].task
            self._fit(strategy.model, [s for s in self.statistics if s.task < task])

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the statistics of the task's frozen features, and refits the router."""
        view: RoutedView = strategy.model
        experience = strategy.experience
        # Cached hidden states stand for images, but a router of texts reads their first tokens.
        texts = isinstance(view, RoutedLanguageModel)
        dataset = samples_of(experience) if texts else experience.dataset.eval()
        loader = torch.utils.data.DataLoader(dataset, strategy.eval_mb_size)
        with evaluating(view):
            batches = [(view.frozen_features(x.to(strategy.device)), y) for x, y, *_ in loader]
        features = torch.cat([frozen for frozen, _ in batches])
        targets = torch.cat(
            # Texts have no classes: all of a task are one.
            [y if y.ndim == 1 else y.new_zeros(len(y)) for _, y in batches]
        ).to(features.device)
        self.statistics = move_statistics(self.statistics, features.device)
        last = self.statistics[-1].task if self.statistics else -1
        task = last if self._continues else last + 1
        self.statistics += self.kind.of(features, targets, task)
        self._fit(view, self.statistics)
        self._parts.finish(strategy.experience)

    def prepare_loaded(self, strategy: Any) -> None:
        """Fits the router of a strategy that has just been loaded.

        :param strategy: the strategy, all of whose plugins are loaded.
        """
        self.statistics = move_statistics(self.statistics, strategy.device)
        self._fit(strategy.model, self.statistics)

    def _fit(self, view: RoutedView, statistics: list[Any]) -> None:
        """Trains the router from zero, so that it depends on the statistics alone."""
        if not statistics:
            view.router = None
            return
        clusters = [s._replace(label=i) for i, s in enumerate(statistics)]
        source = self.kind.draws(clusters)
        device = source.labels.device
        # The usual initialisation would draw from the global generator.
        head = nn.utils.skip_init(nn.Linear, source.dim, len(clusters), device=str(device))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        generator = torch.Generator().manual_seed(self.seed + len(clusters))
        train_head(
            head,
            source,
            epochs=120,
            n_per_class=16,
            learning_rate=0.01,
            generator=generator,
        )
        adapters = [s.task for s in statistics]
        if self.tree is not None:
            adapter_of_task = self.tree.adapter_of_task
            adapters = [adapter_of_task[task] for task in adapters]
        view.router = Router(
            head.weight.detach(), head.bias.detach(), torch.tensor(adapters, device=device)
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics of the classes so far, as tensors and plain values."""
        return {"statistics": statistics_state(self.statistics), "task": self._parts.task}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        """
        check_keys(state, {"statistics", "task"}, "the state of RouterPlugin")
        self.statistics = self.kind.load(state["statistics"])
        self._parts.task = state["task"]

"""Learns, after every task, which adapter a sample belongs to (task-identity inference)."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.features.gaussians import (
    Gaussians,
    StatisticsKind,
    move_statistics,
    statistics_state,
    train_head,
)
from treelora_avalanche.models.views.router import RoutedView, Router
from treelora_avalanche.tree import AdapterTree


class RouterPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Fits the router of a :class:`~treelora_avalanche.models.views.router.RoutedView`.

    The router tells the classes of each task apart by the features of the frozen backbone, which
    never drift (task-identity inference, HiDe); of texts, all of a task count as one class. It is
    trained like the head, on pseudo-features; no image is stored. Costs one frozen pass over the
    data per experience, and stores per class what ``kind`` says. Task labels are not used.

    :param tree: the tree that knows which adapter stands for a task; its
        :class:`~treelora_avalanche.plugins.TreeBuilderPlugin` must come before this plugin. None:
        every task has an adapter, or a prompt, of its own.
    :param seed: seed of the pseudo-features.
    :param kind: what is remembered of a class, see :class:`TaskAdaptiveHeadPlugin`.
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

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Looks at the task's images through the frozen backbone, and fits the router anew."""
        view: RoutedView = strategy.model
        loader = torch.utils.data.DataLoader(
            strategy.experience.dataset.eval(), strategy.eval_mb_size
        )
        with evaluating(view):
            batches = [(view.frozen_features(x.to(strategy.device)), y) for x, y, *_ in loader]
        features = torch.cat([frozen for frozen, _ in batches])
        targets = torch.cat(
            # Texts have no classes but their tasks: all of a task are one.
            [y if y.ndim == 1 else y.new_zeros(len(y)) for _, y in batches]
        ).to(features.device)
        self.statistics = move_statistics(self.statistics, features.device)
        task = self.statistics[-1].task + 1 if self.statistics else 0
        self.statistics += self.kind.of(features, targets, task)
        self._fit(view)

    def prepare_loaded(self, strategy: Any) -> None:
        """Fits the router of a strategy that has just been loaded.

        :param strategy: the strategy, all of whose plugins are loaded.
        """
        self.statistics = move_statistics(self.statistics, strategy.device)
        strategy.model.router = None
        if self.statistics:
            self._fit(strategy.model)

    def _fit(self, view: RoutedView) -> None:
        """Trains the router from nothing, so that it depends on the statistics alone."""
        clusters = [s._replace(label=i) for i, s in enumerate(self.statistics)]
        source = self.kind.draws(clusters)
        device = source.labels.device
        # Without the usual initialisation: it would draw from the global generator.
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
        adapters = [s.task for s in self.statistics]
        if self.tree is not None:
            adapter_of_task = self.tree.adapter_of_task
            adapters = [adapter_of_task[task] for task in adapters]
        view.router = Router(
            head.weight.detach(), head.bias.detach(), torch.tensor(adapters, device=device)
        )

    def state_dict(self) -> dict[str, Any]:
        """The statistics of the classes so far, as tensors and plain values."""
        return {"statistics": statistics_state(self.statistics)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where another plugin of this class has ended.

        :param state: what :meth:`state_dict` returned.
        """
        self.statistics = self.kind.load(state["statistics"])

"""Stores statistics of the features of every class, for heads that are fitted to them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.models.features.extraction import experience_features
from treelora_avalanche.models.features.gaussians import (
    Gaussians,
    StatisticsKind,
    feature_drift,
    move_statistics,
    statistics_state,
)
from treelora_avalanche.models.views.router import RoutedView
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.plugins.within_task_loss import WithinTaskLossPlugin
from treelora_avalanche.state import check_keys


class ClassStatisticsPlugin(WithinTaskLossPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Within-task loss, and statistics of every class; base of the plugins that fit a head to them.

    During a task the loss compares only the task's own classes, so the head unlearns no other
    class; a subclass separates the classes of different tasks afterwards, in :meth:`fit_head`. No
    image is stored. Works with any strategy, including Avalanche's, whose model ends in a linear
    classifier. Costs one pass over the data before and one after each experience, and stores per
    class what ``kind`` defines. In a domain-incremental stream a class has statistics for every
    task, in an online stream for every part of a task. Old statistics follow the drift of the
    features, estimated on the current images
    (:func:`~treelora_avalanche.models.features.gaussians.feature_drift`); not so in a
    :class:`~treelora_avalanche.models.views.router.RoutedView`, where each class is predicted with
    the adapter of its own task. Task labels are not used. Example::

        class NearestMeanPlugin(ClassStatisticsPlugin):
            def fit_head(self, strategy):
                head = classifier_of(strategy.model)
                for s in self.statistics:
                    head.weight.data[s.label] = s.mean
                    head.bias.data[s.label] = -0.5 * s.mean.square().sum()

    :param kind: the statistics of a class,
        :class:`~treelora_avalanche.models.features.gaussians.Gaussians` by default.
    """

    fits_head = True  # re-fitted after every experience: read by TreeLoRA and print(strategy)

    def __init__(self, kind: StatisticsKind | None = None):
        super().__init__()
        self.kind: StatisticsKind = Gaussians() if kind is None else kind
        self.n_tasks = 0
        self.statistics: list[Any] = []
        self._parts = TaskParts()
        self._continues = False

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Restricts the loss to the classes of the experience."""
        self._continues = self._parts.continues(strategy.experience)
        super().before_training_exp(strategy, *args, **kwargs)
        self._check_backbone(strategy.model)
        if self._follows_drift(strategy):
            self._before, _ = experience_features(strategy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Computes the statistics of the new classes, and fits the head to all."""
        super().after_training_exp(strategy, *args, **kwargs)
        features, targets = experience_features(strategy)
        self.statistics = move_statistics(self.statistics, features.device)
        if self._follows_drift(strategy):
            drift = feature_drift(self._before, features)
            self.statistics = [s.moved(*drift) for s in self.statistics]
            del self._before
        self.n_tasks += not self._continues
        self.statistics += self.kind.of(features, targets, self.n_tasks - 1)
        self._parts.finish(strategy.experience)
        self.fit_head(strategy)

    def fit_head(self, strategy: Any) -> None:
        """Fits the head to the statistics of all classes seen so far.

        :param strategy: the strategy, at the end of an experience.
        """
        raise NotImplementedError

    def past_statistics(self) -> list[Any]:
        """Returns the statistics of the tasks before the one in training."""
        task = self.n_tasks - self._continues
        return [s for s in self.statistics if s.task < task]

    def _follows_drift(self, strategy: Any) -> bool:
        return len(self.statistics) > 0 and not isinstance(strategy.model, RoutedView)

    def _check_backbone(self, model: nn.Module) -> None:
        """Raises for statistics of another backbone; a plugin loaded alone has no fingerprint."""
        if not self.statistics:
            return
        means = next(value for value in self.statistics[0] if isinstance(value, Tensor))
        dim = classifier_of(model).in_features
        if means.shape[-1] != dim:
            raise ValueError(
                f"the features of the model should have {means.shape[-1]} values, as the class "
                f"statistics, but have {dim}. Load statistics of the same backbone."
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics of the classes so far, as tensors and plain values."""
        return {
            "n_tasks": self.n_tasks,
            "statistics": statistics_state(self.statistics),
            "task": self._parts.task,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if keys are missing or unknown, or its statistics are of another kind;
            the plugin is then unchanged.
        """
        check_keys(state, self.state_dict(), f"the state of {type(self).__name__}")
        self.statistics = self.kind.load(state["statistics"])
        self.n_tasks = state["n_tasks"]
        self._parts.task = state["task"]

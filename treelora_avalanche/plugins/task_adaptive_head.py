"""Fits a head in closed form, after every task, to the stored Gaussians of the classes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.models.features.extraction import experience_features
from treelora_avalanche.models.features.gaussians import (
    ClassStatistics,
    move_statistics,
    statistics_state,
)
from treelora_avalanche.models.features.regularised import (
    OWN_SHARE,
    RegularisedDiscriminant,
    set_linear,
)
from treelora_avalanche.models.views.discriminant_head import DiscriminantHead
from treelora_avalanche.models.views.frozen import check_frozen_backbone, frozen_features
from treelora_avalanche.plugins.class_statistics import ClassStatisticsPlugin
from treelora_avalanche.state import check_keys, check_same_settings

FROZEN_SHARE = 0.2
"""Weight of the frozen features in ``head="task_adaptive_ensemble"`` (docs/results.md)."""


class TaskAdaptiveHeadPlugin(ClassStatisticsPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Regularised discriminant analysis (RDA) on one Gaussian per class and task.

    The head is :class:`~treelora_avalanche.models.features.regularised.RegularisedDiscriminant`,
    without a step of training or a random draw. It replaces the output of the linear classifier
    between calls of ``strategy.train`` and in evaluations; outputs are log-probabilities, -inf for
    classes not seen yet. The classifier itself is set to linear discriminant analysis, the case
    ``own_share=0``: the next task is trained from it, and a saved adapter contains it.

    Costs and limits are those of :class:`ClassStatisticsPlugin`; stores per class and task its mean
    and at most 64 directions of its covariance, and as much again for the fitted head. Example::

        strategy = SeqLoRA(model, plugins=[TaskAdaptiveHeadPlugin()])

    :param own_share: share of a class's own covariance; with 0 the head is the linear classifier.
    :param frozen_share: weight of a second RDA, on the features of the frozen backbone, see
        :class:`~treelora_avalanche.models.views.discriminant_head.DiscriminantHead`. Above 0, each
        evaluation costs a second pass and each experience a third one, and twice as many statistics
        are stored.
    :raises ValueError: if a share is out of range.
    """

    def __init__(self, *, own_share: float = OWN_SHARE, frozen_share: float = 0.0):
        super().__init__()
        for name, share in (("own_share", own_share), ("frozen_share", frozen_share)):
            if not 0 <= share < 1:
                raise ValueError(
                    f"`{name}` should be at least 0 and below 1, but is {share}. The default is "
                    f"{OWN_SHARE if name == 'own_share' else 0}."
                )
        self.own_share = own_share
        self.frozen_share = frozen_share
        self.frozen_statistics: list[ClassStatistics] = []
        self._head: DiscriminantHead | None = None
        self._handles: list[RemovableHandle] = []
        self._training = False

    @property
    def requires_whole_adapter(self) -> str | None:
        """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""
        return "needs the frozen backbone's features" if self.frozen_share else None

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Detaches the head: the classifier is trained."""
        if self.frozen_share:
            check_frozen_backbone(strategy.model)
        self._training = True
        self._detach()

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Restricts the loss to the classes of the experience."""
        self._head = None  # evaluations during the experience use the classifier in training
        super().before_training_exp(strategy, *args, **kwargs)

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Attaches the head."""
        super().after_training(strategy, *args, **kwargs)
        self._training = False
        self._attach(strategy)

    def before_eval(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Attaches the head for an evaluation between the experiences of a call of ``train``."""
        self._attach(strategy)

    def after_eval(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Detaches the head if training goes on."""
        if self._training:
            self._detach()

    def fit_head(self, strategy: Any) -> None:
        if self.frozen_share:
            self._add_frozen_statistics(strategy)
        set_linear(classifier_of(strategy.model), self.statistics)
        self._fit()

    def prepare_loaded(self, strategy: Any) -> None:
        """Fits and attaches the head of a strategy that has just been loaded.

        :param strategy: the strategy, all of whose plugins are loaded.
        """
        self.statistics = move_statistics(self.statistics, strategy.device)
        self.frozen_statistics = move_statistics(self.frozen_statistics, strategy.device)
        self._training = False
        self._detach()
        self._fit()
        self._attach(strategy)

    def _add_frozen_statistics(self, strategy: Any) -> None:
        features, targets = experience_features(strategy, partial(frozen_features, strategy.model))
        kept = move_statistics(self.frozen_statistics, features.device)
        self.frozen_statistics = kept + self.kind.of(features, targets, self.n_tasks - 1)

    @torch.no_grad()
    def _fit(self) -> None:
        self._head = None
        if not self.statistics or not (self.own_share or self.frozen_share):
            return
        adapted, frozen = (
            RegularisedDiscriminant.fit(statistics, self.own_share) if statistics else None
            for statistics in (self.statistics, self.frozen_statistics)
        )
        assert adapted is not None
        self._head = DiscriminantHead(adapted, frozen, self.frozen_share)

    def _attach(self, strategy: Any) -> None:
        if self._head is not None and not self._handles:
            self._handles = self._head.attach(strategy.model)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics of the classes so far and the shares.

        The head is fitted to them again, with the same result.
        """
        return super().state_dict() | {
            "frozen_statistics": statistics_state(self.frozen_statistics),
            "own_share": float(self.own_share),
            "frozen_share": float(self.frozen_share),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if keys are missing or unknown, the statistics are of another kind, or
            a share differs; the plugin is then unchanged.
        """
        own = self.state_dict()
        check_keys(state, own, "the state of TaskAdaptiveHeadPlugin")
        check_same_settings(state, {name: own[name] for name in ("own_share", "frozen_share")})
        frozen = self.kind.load(state["frozen_statistics"])
        super().load_state_dict(state)
        self.frozen_statistics = frozen

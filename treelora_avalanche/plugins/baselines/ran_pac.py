"""RanPAC (McDonnell et al., NeurIPS 2023, arXiv 2307.02251): a ridge classifier on randomly
projected features, and adaptation to the first experience alone."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters.classifier import check_classes, classifier_of
from treelora_avalanche.models.features.extraction import experience_features
from treelora_avalanche.models.features.random_projection import (
    RandomProjectionClassifier,
    choose_strength,
    least_strength,
    ridge_weight,
)
from treelora_avalanche.models.views.split import SplitView
from treelora_avalanche.state import check_keys, check_same_settings


class RidgeHeadPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Fits the classifier by ridge regression on randomly projected features of all experiences.

    With ``h = relu(P^T f)`` for features f, the Gram matrix ``G = sum h h^T`` and the class sums
    ``C = sum h y^T`` over all samples so far, the classifier is ``W = (G + λ I)^-1 C`` (Algorithm 1
    and Eq. 4 to 6). λ is chosen after every experience, on a fifth of its samples, see
    :func:`~treelora_avalanche.models.features.random_projection.choose_strength`, and exceeds the
    rounding errors of G. G and C are sums: for one λ, W does not depend on the order of the
    experiences, as long as the features stay.

    Stores ``n_projections * (n_projections + n_classes)`` values. Costs one pass over the data of
    an experience. The model's classifier must be a
    :class:`~treelora_avalanche.models.features.random_projection.RandomProjectionClassifier`. Task
    labels are not used. Example::

        project_classifier(model, n_projections=2000, seed=0)
        strategy = Naive(model=model, plugins=[RidgeHeadPlugin()], train_epochs=0, ...)

    :param seed: seed of the held-out samples.
    """

    fits_head = True
    """See :class:`~treelora_avalanche.strategies.base.summary.StrategySummary`."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed
        self.strength = 1.0
        """λ of the last experience."""
        self.n_experiences = 0
        self.gram: Tensor | None = None
        self.sums: Tensor | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Checks the classifier and its number of classes."""
        check_classes(strategy.model, strategy.experience)
        head = classifier_of(strategy.model)
        if not isinstance(head, RandomProjectionClassifier):
            raise ValueError(
                "the model's classifier should be a RandomProjectionClassifier for "
                f"RidgeHeadPlugin, but is a {type(head).__name__}. Call `project_classifier(model, "
                "...)` before the strategy is built."
            )

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the experience to G and C, chooses λ and fits the classifier."""
        features, targets = experience_features(strategy)
        head: Any = classifier_of(strategy.model)
        samples = head.project(features)
        gram, sums = samples.T @ samples, self._sums(samples, targets, head.out_features)
        if self.gram is not None and self.sums is not None:  # loaded ones are on the CPU
            gram, sums = gram + self.gram.to(gram), sums + self.sums.to(sums)
        self.gram, self.sums = gram, sums
        generator = torch.Generator().manual_seed(self.seed + self.n_experiences)
        chosen = choose_strength(samples, targets, generator) or self.strength
        self.strength = max(chosen, least_strength(gram))
        self.n_experiences += 1
        seen = (sums != 0).any(0).nonzero()[:, 0]
        head.fit(ridge_weight(gram, sums, self.strength), seen)

    @staticmethod
    def _sums(samples: Tensor, targets: Tensor, n_classes: int) -> Tensor:
        sums = samples.new_zeros(n_classes, samples.shape[1])
        return sums.index_add_(0, targets, samples).T.contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Returns G, C (None before the first experience) and λ."""
        return {
            "seed": self.seed,
            "strength": self.strength,
            "n_experiences": self.n_experiences,
            "gram": self.gram,
            "sums": self.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it lacks keys or has unknown ones, or the seed differs; the plugin is
            then unchanged.
        """
        check_keys(state, self.state_dict(), "the state of RidgeHeadPlugin")
        check_same_settings(state, {"seed": self.seed})
        self.strength, self.n_experiences = state["strength"], state["n_experiences"]
        self.gram, self.sums = state["gram"], state["sums"]


class FirstExperienceOnlyPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Trains in the first experience alone; from then on the whole model is frozen.

    First-session adaptation: later experiences take no epochs, and the output of all blocks is
    computed once per sample where
    :class:`~treelora_avalanche.plugins.ActivationCachePlugin` can cache it. For plugins that set
    the classifier after every experience, such as :class:`RidgeHeadPlugin`, which come before this
    one. Of an online stream the first part is the first experience. Works with any strategy. Task
    labels are not used. Example::

        plugins = [RidgeHeadPlugin(), FirstExperienceOnlyPlugin()]
    """

    requires_whole_adapter = "freezes the whole adapter itself"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(self) -> None:
        super().__init__()
        self.settled = False
        """Whether the first experience is over."""

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Skips the epochs of later experiences."""
        if self.settled:
            strategy.stop_training()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Freezes the model after the first experience."""
        self.settled = True
        self.prepare_loaded(strategy)

    def prepare_loaded(self, strategy: Any) -> None:
        """Sets the number of frozen blocks of the model.

        :param strategy: the strategy.
        """
        view = strategy.model
        if isinstance(view, SplitView):
            view.n_settled = len(view.blocks) if self.settled else 0
            view.train(view.training)  # recomputes the number of frozen blocks

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the first experience is over."""
        return {"settled": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it lacks keys or has unknown ones.
        """
        check_keys(state, {"settled"}, "the state of FirstExperienceOnlyPlugin")
        self.settled = state["settled"]

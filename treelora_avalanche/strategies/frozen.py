"""Classifiers on the features of the untrained backbone: baselines for every trained method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from torch import Tensor, nn
from typing_extensions import Unpack

from treelora_avalanche.adapters.classifier import check_classes, classifier_of
from treelora_avalanche.defaults import VISION_TRAINING
from treelora_avalanche.models.features.extraction import experience_features
from treelora_avalanche.models.features.random_projection import (
    check_projections,
    project_classifier,
)
from treelora_avalanche.models.views.precision import train_in_float32
from treelora_avalanche.plugins import RidgeHeadPlugin, TaskAdaptiveHeadPlugin
from treelora_avalanche.state import check_keys
from treelora_avalanche.strategies.base.arguments import TemplateOptions, check_image_model
from treelora_avalanche.strategies.base.untrained import UntrainedStrategy


class NearestMeanHeadPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Sets the classifier to the nearest class mean: ``w_c = m_c``, ``b_c = -|m_c|^2 / 2``.

    The class mean m_c runs over all samples of class c from all experiences. (Avalanche's
    ``NCMClassifier`` averages the means of experiences pairwise, and treats an unseen class as one
    with mean zero.) Stores one feature sum and one count per class. Task labels are not used.

    Example::

        strategy = Naive(model=model, plugins=[NearestMeanHeadPlugin()], train_epochs=0, ...)
    """

    fits_head = True
    """See :class:`~treelora_avalanche.strategies.base.summary.StrategySummary`."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the experience's features to the means."""
        features, targets = experience_features(strategy)
        head = classifier_of(strategy.model)
        if self._sums is None or self._counts is None:
            self._sums = torch.zeros_like(head.weight)
            self._counts = torch.zeros_like(head.bias)
        # Loaded ones are on the CPU.
        self._sums, self._counts = self._sums.to(features), self._counts.to(features)
        self._sums.index_add_(0, targets, features)
        self._counts.index_add_(0, targets, torch.ones_like(features[:, 0]))
        means = self._sums / self._counts.clamp(min=1)[:, None]
        head.weight.copy_(means)
        bias = -0.5 * means.square().sum(1)
        head.bias.copy_(torch.where(self._counts > 0, bias, float("-inf")))

    def state_dict(self) -> dict[str, Any]:
        """Returns the feature sums and sample counts per class; None before the first task."""
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it lacks keys or has unknown ones; the plugin is then unchanged.
        """
        check_keys(state, self.state_dict(), "the state of NearestMeanHeadPlugin")
        self._sums, self._counts = state["sums"], state["counts"]


class _FrozenBackbone(UntrainedStrategy):
    """A frozen backbone with a classifier that a plugin sets after every experience.

    The head alone requires a gradient, though none is computed: a saved state thus holds the head,
    and a fingerprint of the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eval_mb_size: int | None = VISION_TRAINING.eval_mb_size,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        **kwargs: Unpack[TemplateOptions],
    ):
        check_image_model(model, type(self).__name__)
        head_plugin = self._make_head(model)
        model.requires_grad_(False)
        classifier_of(model).requires_grad_(True)
        train_in_float32(model)  # sums over many samples
        super().__init__(
            model=model,
            criterion=nn.CrossEntropyLoss(),
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or ()), head_plugin],
            evaluator=evaluator,
            **kwargs,
        )

    def _make_head(self, model: nn.Module) -> SupervisedPlugin:
        """The plugin that sets the classifier, which may be replaced here."""
        raise NotImplementedError

    def _before_training_exp(self, **kwargs: Any) -> None:
        check_classes(self.model, self.experience)
        super()._before_training_exp(**kwargs)

    def _before_eval_exp(self, **kwargs: Any) -> None:
        check_classes(self.model, self.experience)
        super()._before_eval_exp(**kwargs)


class FrozenNCM(_FrozenBackbone):
    """Nearest class mean (Mensink et al., TPAMI 2013) on features of the frozen backbone.

    Stores one mean and one count per class. Nothing is trained. Task labels are not used.

    Example::

        strategy = FrozenNCM(timm.create_model("vit_base_patch16_224", pretrained=True))

    :param model: a pretrained model with a linear classifier, which is frozen.
    :param eval_mb_size: samples per forward pass.
    :param device: where to compute.
    :param plugins: further plugins; the list is copied.
    :param evaluator: Avalanche's evaluation plugin, or a callable that makes it.
    :param kwargs: further arguments of :class:`avalanche.training.templates.SupervisedTemplate`.
    :raises ValueError: if the model has no linear classifier; it is then unchanged.
    """

    def _make_head(self, model: nn.Module) -> SupervisedPlugin:
        return NearestMeanHeadPlugin()


class FrozenGaussian(_FrozenBackbone):
    """The task-adaptive head on features of the frozen backbone.

    The control for every strategy with ``head="task_adaptive"``: the accuracy of that head without
    any adaptation of the backbone, see
    :class:`~treelora_avalanche.plugins.TaskAdaptiveHeadPlugin`. Stores per class its mean and at
    most 64 directions of its covariance. Task labels are not used.

    Example::

        strategy = FrozenGaussian(timm.create_model("vit_base_patch16_224", pretrained=True))

    The arguments are those of :class:`FrozenNCM`.
    """

    def _make_head(self, model: nn.Module) -> SupervisedPlugin:
        return TaskAdaptiveHeadPlugin()


class FrozenOptions(TemplateOptions, total=False):
    """Arguments of :class:`FrozenNCM`."""

    eval_mb_size: int | None
    device: str | torch.device
    plugins: Sequence[SupervisedPlugin] | None
    evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None


class FrozenRanPAC(_FrozenBackbone):
    """RanPAC without a first session (McDonnell et al., NeurIPS 2023, arXiv 2307.02251).

    Ridge classifier on random projections of the frozen backbone's features, in closed form, see
    :class:`~treelora_avalanche.plugins.RidgeHeadPlugin`. Stores ``n_projections * (n_projections +
    n_classes)`` values. Task labels are not used.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True)
        strategy = FrozenRanPAC(model, n_projections=10_000)

    :param model: a pretrained model with a linear classifier, which is replaced.
    :param n_projections: number of random projections; the paper's is 10000.
    :param seed: seed of the projections and of the held-out samples.
    :param kwargs: the arguments of :class:`FrozenNCM`.
    :raises ValueError: if an argument is out of range, or the model has no linear classifier; it is
        then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        n_projections: int = 5000,
        seed: int = 0,
        **kwargs: Unpack[FrozenOptions],
    ):
        check_projections(n_projections)
        self._projections = (n_projections, seed)
        super().__init__(model, **kwargs)

    def _make_head(self, model: nn.Module) -> SupervisedPlugin:
        project_classifier(model, *self._projections)
        return RidgeHeadPlugin(self._projections[1])

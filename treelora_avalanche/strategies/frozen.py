"""The frozen backbone as a contender: what is not above it is not worth its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from treelora_avalanche.adapters import find_host
from treelora_avalanche.adapters.classifier import check_classes, classifier_of
from treelora_avalanche.checkpoint import Resumable
from treelora_avalanche.models.features.extraction import extract_features
from treelora_avalanche.plugins import TaskAdaptiveHeadPlugin
from treelora_avalanche.state import check_keys
from treelora_avalanche.strategies.base.arguments import positional_model


class NearestMeanHeadPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Sets the classifier to the nearest class mean: w = mean, b = -|mean|^2 / 2.

    The means run over all samples of a class, in whatever experience it came. (Avalanche's
    ``NCMClassifier`` averages the means of experiences by halves, and takes a class not seen yet
    for one whose mean is zero.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the experience's features to the means."""
        features, targets = extract_features(
            strategy.model,
            strategy.experience.dataset.eval(),
            batch_size=strategy.eval_mb_size,
            device=strategy.device,
        )
        head = classifier_of(strategy.model)
        if self._sums is None or self._counts is None:
            self._sums = torch.zeros_like(head.weight)
            self._counts = torch.zeros_like(head.bias)
        # Loaded ones come on the CPU.
        self._sums, self._counts = self._sums.to(features), self._counts.to(features)
        self._sums.index_add_(0, targets, features)
        self._counts.index_add_(0, targets, torch.ones_like(features[:, 0]))
        means = self._sums / self._counts.clamp(min=1)[:, None]
        head.weight.copy_(means)
        bias = -0.5 * means.square().sum(1)
        head.bias.copy_(torch.where(self._counts > 0, bias, float("-inf")))

    def state_dict(self) -> dict[str, Any]:
        """The sums of the features and the counts of the samples, per class; None at first."""
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where another plugin of this class has ended.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it lacks keys or has unknown ones; the plugin is then as it was.
        """
        check_keys(state, self.state_dict(), "the state of NearestMeanHeadPlugin")
        self._sums, self._counts = state["sums"], state["counts"]


class _FrozenBackbone(Resumable, SupervisedTemplate):
    """A backbone that is never trained, and a head that a plugin sets after every experience.

    The head alone requires a gradient, though none is computed: so it is what a saved state holds,
    and the rest the backbone that the state goes with.

    :param model: a pretrained model with a linear classifier.
    :param eval_mb_size: samples per forward pass.
    :param device: where to compute.
    :param plugins: further plugins; the list is copied.
    :param evaluator: Avalanche's evaluation plugin, or a callable that makes it.
    :param base_kwargs: further arguments of the template.
    :raises ValueError: if the model has no linear classifier; it is then as it was.
    """

    head_plugin: type[SupervisedPlugin]

    def __init__(
        self,
        *,
        model: nn.Module,
        eval_mb_size: int | None = 192,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        **base_kwargs: Any,
    ):
        if find_host(model) is not None:
            raise ValueError(
                f"`model` is a {type(model).__name__}, and {type(self).__name__} takes image "
                "models with a classifier, such as timm.create_model('vit_base_patch16_224')."
            )
        head = classifier_of(model)  # raises where there is none
        model.requires_grad_(False)
        head.requires_grad_(True)
        super().__init__(
            model=model,
            # The template wants an optimizer, and takes no step with it: there are no epochs.
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=eval_mb_size or 1,
            train_epochs=0,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or ()), self.head_plugin()],
            evaluator=evaluator,
            **base_kwargs,
        )

    def _before_training_exp(self, **kwargs: Any) -> None:
        check_classes(self.model, self.experience)
        super()._before_training_exp(**kwargs)

    def _before_eval_exp(self, **kwargs: Any) -> None:
        check_classes(self.model, self.experience)
        super()._before_eval_exp(**kwargs)


@positional_model
class FrozenNCM(_FrozenBackbone):
    """Nearest class mean on the features of the frozen backbone. Nothing is trained.

    The arguments are those of :class:`SeqLoRA` that do not concern training.
    """

    head_plugin = NearestMeanHeadPlugin


@positional_model
class FrozenGaussian(_FrozenBackbone):
    """The frozen backbone with the head that is trained on pseudo-features.

    The control of every strategy with ``head="task_adaptive"``: what the head alone can do. For the
    head see :class:`~treelora_avalanche.plugins.TaskAdaptiveHeadPlugin`. The arguments are those of
    :class:`SeqLoRA` that do not concern training.
    """

    head_plugin = TaskAdaptiveHeadPlugin

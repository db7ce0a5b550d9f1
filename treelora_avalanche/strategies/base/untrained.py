"""Base of the strategies that take no optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.checkpoint import Resumable
from treelora_avalanche.strategies.base.arguments import NamedArguments, TemplateOptions
from treelora_avalanche.strategies.base.summary import StrategySummary


class UntrainedStrategy(NamedArguments, StrategySummary, Resumable, SupervisedTemplate):
    """Passes over each experience in its plugins; there are no epochs and no optimizer steps.

    :param model: the model, whose parameters are not updated by gradients.
    :param criterion: the loss that is evaluated.
    :param eval_mb_size: samples per forward pass.
    :param device: where to compute.
    :param plugins: further plugins; the list is copied.
    :param evaluator: Avalanche's evaluation plugin, or a callable that makes it.
    :param kwargs: further arguments of :class:`avalanche.training.templates.SupervisedTemplate`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        criterion: nn.Module,
        eval_mb_size: int | None,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        **kwargs: Unpack[TemplateOptions],
    ):
        super().__init__(
            model=model,
            # The template requires an optimizer, and takes no step with it.
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            criterion=criterion,
            train_mb_size=eval_mb_size or 1,
            train_epochs=0,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=plugins,
            evaluator=evaluator,
            **kwargs,
        )

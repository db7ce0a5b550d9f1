"""In-context learning: demonstrations in the prompt, and no training (FIX in the paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.checkpoint import Resumable
from treelora_avalanche.defaults import LANGUAGE_TRAINING
from treelora_avalanche.models.token_loss import TokenCrossEntropy
from treelora_avalanche.models.views.in_context_language import InContextLanguageModel
from treelora_avalanche.plugins.baselines.demonstrations import DemonstrationsPlugin
from treelora_avalanche.strategies.base.arguments import check_language_model, positional_model
from treelora_avalanche.strategies.base.defaults import language_evaluator
from treelora_avalanche.strategies.base.token_batches import TokenBatches


@positional_model
class InContext(TokenBatches, Resumable, SupervisedTemplate):
    """A frozen language model that reads demonstrations of a task before it answers a prompt.

    TRACE (Wang et al. 2023, arXiv 2310.06762) prepends six demonstrations of the task that a prompt
    is known to belong to. No task is named here at test time, and the demonstrations are those of
    the nearest of the tasks seen: see
    :class:`~treelora_avalanche.models.views.in_context_language.InContextLanguageModel`. They take
    part in generation; the loss is that of the model without them.

    Stores per task ``n_demonstrations`` pairs of prompt and answer, and one vector as wide as the
    model's embeddings.

    :param model: a :class:`~treelora_avalanche.models.LanguageModel`, which is frozen. Its
        ``max_length`` is the room for demonstrations and prompt together; the first go where it is
        too short.
    :param n_demonstrations: demonstrations per task, from its training texts.
    :param seed: of their drawing.
    :param eval_mb_size: mini-batch size for evaluation.
    :param device: where to compute.
    :param plugins: further plugins; the list is copied.
    :param evaluator: Avalanche's evaluation plugin, or a callable that makes it.
    :param base_kwargs: further arguments of the template.
    :raises ValueError: if an argument is out of range, or the model of another kind; it is then as
        it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        n_demonstrations: int = 6,
        seed: int = 0,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = language_evaluator,
        **base_kwargs: Any,
    ):
        check_language_model(model, "InContext")
        module: Any = model.module if isinstance(model, TrainableView) else model
        shown = InContextLanguageModel(module)
        demonstrations = DemonstrationsPlugin(shown, n_demonstrations, seed)
        module.requires_grad_(False)
        eval_mb_size = eval_mb_size or LANGUAGE_TRAINING.eval_mb_size
        super().__init__(
            model=shown,
            # The template wants an optimizer, and takes no step with it: there are no epochs.
            optimizer=torch.optim.SGD(shown.parameters(), lr=0.0),
            criterion=TokenCrossEntropy(),
            train_mb_size=eval_mb_size,
            train_epochs=0,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or ()), demonstrations],
            evaluator=evaluator,
            **base_kwargs,
        )

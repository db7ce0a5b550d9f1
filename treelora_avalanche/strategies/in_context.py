"""In-context learning: demonstrations in the prompt, without training (TRACE's FIX)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.defaults import LANGUAGE_TRAINING
from treelora_avalanche.models.token_loss import TokenCrossEntropy
from treelora_avalanche.models.views.in_context_language import InContextLanguageModel
from treelora_avalanche.plugins.baselines.demonstrations import DemonstrationsPlugin
from treelora_avalanche.strategies.base.arguments import TemplateOptions, check_language_model
from treelora_avalanche.strategies.base.defaults import language_evaluator
from treelora_avalanche.strategies.base.token_batches import TokenBatches
from treelora_avalanche.strategies.base.untrained import UntrainedStrategy


class InContext(TokenBatches, UntrainedStrategy):
    """A frozen language model whose prompts begin with demonstrations of the task.

    TRACE (Wang et al. 2023, arXiv 2310.06762) prepends six demonstrations of the task that a prompt
    is known to belong to. Here the demonstrations are those of the nearest seen task, see
    :class:`~treelora_avalanche.models.views.in_context_language.InContextLanguageModel`. They are
    balanced over a task's answers, and used in generation, whose first letter, line or paragraph is
    the answer, whichever form the task's training answers have; the loss is that of the model
    without them.

    Stores per task up to ``n_demonstrations`` pairs of prompt and answer, and one vector as wide as
    the model's embeddings. Task labels are not used.

    Example::

        strategy = InContext(create_language_model("meta-llama/Llama-2-7b-hf"), n_demonstrations=6)

    :param model: a :class:`~treelora_avalanche.models.LanguageModel`, which is frozen. Its
        ``max_length`` covers demonstrations and prompt together: fewer are drawn where they do
        not fit before a prompt of median length, with a warning, and the first are left out before
        longer ones.
    :param n_demonstrations: demonstrations per task, from its training texts.
    :param seed: seed of their choice.
    :param eval_mb_size: mini-batch size for evaluation.
    :param device: where to compute.
    :param plugins: further plugins; the list is copied.
    :param evaluator: Avalanche's evaluation plugin, or a callable that makes it.
    :param kwargs: further arguments of :class:`avalanche.training.templates.SupervisedTemplate`.
    :raises ValueError: if an argument is out of range, or the model is of another kind; the model
        is then unchanged. The first ``train`` raises one if no demonstration fits.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        n_demonstrations: int = 6,
        seed: int = 0,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = language_evaluator,
        **kwargs: Unpack[TemplateOptions],
    ):
        check_language_model(model, "InContext")
        module: Any = model.module if isinstance(model, TrainableView) else model
        shown = InContextLanguageModel(module)
        demonstrations = DemonstrationsPlugin(shown, n_demonstrations, seed)
        module.requires_grad_(False)
        super().__init__(
            model=shown,
            criterion=TokenCrossEntropy(),
            eval_mb_size=eval_mb_size or LANGUAGE_TRAINING.eval_mb_size,
            device=device,
            plugins=[*(plugins or ()), demonstrations],
            evaluator=evaluator,
            **kwargs,
        )

"""What the strategies share that train a small part of a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from treelora_avalanche.adapters import TrainableView, find_classifier
from treelora_avalanche.names import check_known
from treelora_avalanche.plugins import FiniteLossPlugin, TaskAdaptiveHeadPlugin
from treelora_avalanche.strategies.resumable import Resumable

HEADS: dict[str, Callable[[], list[SupervisedPlugin]]] = {
    "linear": list,
    "task_adaptive": lambda: [TaskAdaptiveHeadPlugin()],
}

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


class ParameterEfficientStrategy(Resumable, SupervisedTemplate):
    """Trains what a view of a model shows, on one experience after the other.

    The base of the strategies with LoRA (:class:`SeqLoRA` and its heirs) and of those with prompts.
    Task labels are not used.

    :param model: the view of a model whose small part is to be trained.
    :param optimizer: an optimizer, or a callable that makes one from parameters, such as
        ``functools.partial(torch.optim.Adam, lr=1e-3)``. The default is Adam at 0.005, as in the
        paper for ViTs.
    :param criterion: the loss, of logits ``(batch, n_classes)`` and targets ``(batch,)``.
    :param train_mb_size: mini-batch size for training.
    :param train_epochs: epochs per experience.
    :param eval_mb_size: mini-batch size for evaluation.
    :param device: where to train.
    :param head: ``"linear"``, a classifier trained by the loss alone; ``"task_adaptive"``, one that
        is re-trained after every task, for class-incremental streams: see
        :class:`~treelora_avalanche.plugins.TaskAdaptiveHeadPlugin`.
    :param plugins: further plugins; the list is copied.
    :param evaluator: Avalanche's evaluation plugin, or a callable that makes it.
    :param eval_every: see :class:`avalanche.training.templates.SupervisedTemplate`.
    :param base_kwargs: further arguments of the template.
    :raises ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        *,
        model: TrainableView,
        optimizer: Optimizer | OptimizerFactory | None = None,
        criterion: nn.Module | Callable[..., torch.Tensor] | None = None,
        train_mb_size: int = 192,
        train_epochs: int = 20,
        eval_mb_size: int | None = 192,
        device: str | torch.device = "cpu",
        head: str = "linear",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ):
        check_known("`head`", head, HEADS)
        # On its device now: an optimizer made of parameters that move later would train copies.
        model.to(device)
        if optimizer is None:
            optimizer = partial(torch.optim.Adam, lr=0.005)
        if not isinstance(optimizer, Optimizer):
            optimizer = optimizer(model.parameters())
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or ()), *HEADS[head](), FiniteLossPlugin()],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )

    def _before_training_exp(self, **kwargs: Any) -> None:
        experience = self.experience
        if len(experience.dataset) == 0:
            raise ValueError(
                f"experience {experience.current_experience} has no samples; "
                "leave it out of the stream."
            )
        classifier = find_classifier(self.model)
        # Without a classifier, as in language models, an experience need not have classes.
        largest = max(experience.classes_in_this_experience) if classifier is not None else -1
        if classifier is not None and largest >= classifier.out_features:
            raise ValueError(
                f"experience {experience.current_experience} has class {largest}, and the model's "
                f"classifier {classifier.out_features} outputs; make the model with "
                f"num_classes={largest + 1} or more."
            )
        super()._before_training_exp(**kwargs)

"""What the strategies share that train a small part of a frozen backbone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from treelora_avalanche.adapters import TrainableView, find_host
from treelora_avalanche.adapters.classifier import check_classes
from treelora_avalanche.checkpoint import Resumable
from treelora_avalanche.choices import HEADS, PRECISIONS, SCHEDULES, check_known
from treelora_avalanche.models.views.precision import set_precision
from treelora_avalanche.plugins import (
    CosineSchedulePlugin,
    DataParallelPlugin,
    FiniteLossPlugin,
    TaskAdaptiveHeadPlugin,
)
from treelora_avalanche.strategies.base.accumulation import GradientAccumulation, check_accumulation
from treelora_avalanche.strategies.base.defaults import (
    LANGUAGE,
    VISION,
    OptimizerFactory,
)
from treelora_avalanche.strategies.base.token_batches import TokenBatches

logger = logging.getLogger(__name__)


class ParameterEfficientStrategy(GradientAccumulation, TokenBatches, Resumable, SupervisedTemplate):
    """Trains what a view of a model shows, on one experience after the other.

    The base of the strategies with LoRA (:class:`SeqLoRA` and its heirs) and of those with prompts.
    Task labels are not used.

    What is not given is chosen for the kind of model, as in the TreeLoRA paper: for images, Adam at
    0.005, batches of 192, 20 epochs; for a :class:`~treelora_avalanche.models.LanguageModel`, AdamW
    at 1e-4 along a cosine, batches of 4, one epoch (the paper's numbers for TRACE differ from task
    to task: ``strategy.train_epochs`` may be set before each), the loss over the tokens of the
    answers, and batches of samples of similar length.

    :param model: the view of a model whose small part is to be trained.
    :param optimizer: an optimizer, or a callable that makes one from parameters, such as
        ``functools.partial(torch.optim.Adam, lr=1e-3)``.
    :param criterion: the loss, of logits ``(batch, n_classes)`` and targets ``(batch,)``.
    :param train_mb_size: mini-batch size for training.
    :param train_epochs: epochs per experience.
    :param eval_mb_size: mini-batch size for evaluation.
    :param accumulation_steps: mini-batches whose gradients make one step of the optimizer; the step
        is that of one batch of all their samples.
    :param schedule: ``"constant"`` or ``"cosine"``, the learning rate within an experience; see
        :class:`~treelora_avalanche.plugins.CosineSchedulePlugin`.
    :param precision: of the forward pass, ``"fp32"``, ``"bf16"`` or ``"auto"``: see
        :func:`~treelora_avalanche.models.views.precision.autocast_dtype`.
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
        train_mb_size: int | None = None,
        train_epochs: int | None = None,
        eval_mb_size: int | None = None,
        accumulation_steps: int = 1,
        schedule: str | None = None,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
        head: str = "linear",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ):
        check_training(
            model,
            head=head,
            schedule=schedule,
            precision=precision,
            accumulation_steps=accumulation_steps,
            plugins=plugins,
        )
        defaults = LANGUAGE if find_host(model) else VISION
        schedule = schedule or defaults.numbers.schedule
        self.accumulation_steps = accumulation_steps
        parallel = [p for p in plugins or () if isinstance(p, DataParallelPlugin)]
        for plugin in parallel:
            plugin.shard(model, device)
        set_precision(model, precision, device)
        # On its device now: an optimizer made of parameters that move later would train copies.
        model.to(device)
        if optimizer is None:
            optimizer = defaults.optimizer()
        if not isinstance(optimizer, Optimizer):
            optimizer = optimizer(model.parameters())
        if criterion is None:
            criterion = defaults.criterion()
        if evaluator is default_evaluator:
            evaluator = defaults.evaluator
        own: list[SupervisedPlugin] = [FiniteLossPlugin()]
        if head == "task_adaptive":
            own.insert(0, TaskAdaptiveHeadPlugin())
        if schedule == "cosine":
            own.append(CosineSchedulePlugin())
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            train_mb_size=train_mb_size or defaults.numbers.train_mb_size,
            train_epochs=defaults.numbers.train_epochs if train_epochs is None else train_epochs,
            eval_mb_size=eval_mb_size or defaults.numbers.eval_mb_size,
            device=device,
            # Processes are alike, and gradients whole, before anything looks at them.
            plugins=[*parallel, *(p for p in plugins or () if p not in parallel), *own],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )
        logger.info(
            "%s, %s schedule; batches of %d, %d per step; %d epochs",
            type(optimizer).__name__ + f" at {optimizer.param_groups[0]['lr']:g}",
            schedule,
            self.train_mb_size,
            accumulation_steps,
            self.train_epochs,
        )

    def _before_training_exp(self, **kwargs: Any) -> None:
        experience = self.experience
        if len(experience.dataset) == 0:
            raise ValueError(
                f"experience {experience.current_experience} has no samples; "
                "leave it out of the stream."
            )
        check_classes(self.model, experience)
        super()._before_training_exp(**kwargs)

    def _before_eval_exp(self, **kwargs: Any) -> None:
        check_classes(self.model, self.experience)
        super()._before_eval_exp(**kwargs)


def check_training(
    model: nn.Module,
    *,
    head: str = "linear",
    schedule: str | None = None,
    precision: str = "fp32",
    accumulation_steps: int = 1,
    plugins: Sequence[SupervisedPlugin] | None = None,
    **_: Any,
) -> None:
    """Raise an error for what :class:`ParameterEfficientStrategy` cannot train with.

    The arguments are those of the strategy; others are not looked at.

    :raises ValueError: if an argument is out of range, or does not go with the model.
    """
    check_known("`head`", head, HEADS)
    check_known("`precision`", precision, PRECISIONS)
    if schedule is not None:
        check_known("`schedule`", schedule, SCHEDULES)
    check_accumulation(accumulation_steps, plugins or ())
    if head != "linear" and find_host(model) is not None:
        raise ValueError(
            f"`head` is {head!r}, which re-trains a classifier, and a language model has none; use "
            "head='linear'."
        )

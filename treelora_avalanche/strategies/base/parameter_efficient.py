"""Base of the strategies that train a small part of a frozen backbone."""

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
from torch.utils.data import default_collate
from typing_extensions import Unpack

from treelora_avalanche.adapters import TrainableView, find_host, lora_layers
from treelora_avalanche.adapters.classifier import (
    check_classes,
    classifier_of,
    find_classifiers,
)
from treelora_avalanche.adapters.first_pass import TRACED_SAMPLES, TRACED_TOKENS, skip_check
from treelora_avalanche.adapters.graph import check_gradients
from treelora_avalanche.checkpoint import Resumable
from treelora_avalanche.choices import HEADS, PRECISIONS, SCHEDULES, check_known
from treelora_avalanche.models.views.precision import set_precision
from treelora_avalanche.plugins import (
    CosineSchedulePlugin,
    FiniteLossPlugin,
    head_plugins,
)
from treelora_avalanche.state import random_state, set_random_state
from treelora_avalanche.strategies.base.accumulation import GradientAccumulation, check_accumulation
from treelora_avalanche.strategies.base.arguments import NamedArguments, TemplateOptions
from treelora_avalanche.strategies.base.defaults import LANGUAGE, VISION, OptimizerFactory, Training
from treelora_avalanche.strategies.base.preprocessing import warn_of_other_preprocessing
from treelora_avalanche.strategies.base.summary import StrategySummary
from treelora_avalanche.strategies.base.token_batches import TokenBatches

logger = logging.getLogger(__name__)


class ParameterEfficientStrategy(
    NamedArguments,
    StrategySummary,
    GradientAccumulation,
    TokenBatches,
    Resumable,
    SupervisedTemplate,
):
    """Trains the parameters that a view of a model exposes, one experience after the other.

    Base of the LoRA strategies (:class:`SeqLoRA` and its subclasses) and of the prompt strategies.
    Task labels are not used.

    Defaults depend on the kind of model and follow the TreeLoRA paper (Appendix A.3). Image models:
    Adam at 0.005, batches of 192, 20 epochs. A :class:`~treelora_avalanche.models.LanguageModel`:
    AdamW at 1e-4 with a cosine schedule, batches of 4 sequences of similar length, one epoch, the
    loss over the tokens of the answers. The paper's epochs for TRACE differ between tasks:
    ``strategy.train_epochs`` may be set before each.

    Example::

        strategy = SeqLoRA(model, lr=0.001, train_epochs=5, precision="bf16", device="cuda")

    :param model: a view of the model that exposes its trainable parameters.
    :param optimizer: an optimizer, or a callable that makes one from parameters, such as
        ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)``.
    :param lr: learning rate of the default optimizer; set it in ``optimizer`` if that is given.
    :param criterion: the loss, of logits ``(batch, n_classes)`` and targets ``(batch,)``.
    :param train_mb_size: mini-batch size for training.
    :param train_epochs: epochs per experience.
    :param eval_mb_size: mini-batch size for evaluation.
    :param accumulation_steps: mini-batches per optimizer step, see
        :class:`~treelora_avalanche.strategies.base.accumulation.GradientAccumulation`.
    :param schedule: learning rate within an experience, ``"constant"`` or ``"cosine"``, see
        :class:`~treelora_avalanche.plugins.CosineSchedulePlugin`.
    :param precision: of the forward pass, ``"fp32"``, ``"bf16"`` or ``"auto"``, see
        :func:`~treelora_avalanche.models.views.precision.autocast_dtype`.
    :param device: where to train.
    :param head: ``"linear"``, a classifier trained by the loss alone; or, for class-incremental
        streams, one that is fitted after every task to stored class statistics:
        ``"task_adaptive"``, in closed form, see
        :class:`~treelora_avalanche.plugins.TaskAdaptiveHeadPlugin`;
        ``"task_adaptive_ensemble"``, the same averaged with the frozen backbone's; or
        ``"task_adaptive_trained"``, see :class:`~treelora_avalanche.plugins.TrainedHeadPlugin`.
    :param plugins: further plugins; the list is copied.
    :param evaluator: Avalanche's evaluation plugin, or a callable that makes it.
    :param kwargs: ``eval_every`` and ``peval_mode``, see
        :class:`avalanche.training.templates.SupervisedTemplate`.
    :raises TypeError: for an unknown argument; the model is then unchanged.
    :raises ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        model: TrainableView,
        *,
        optimizer: Optimizer | OptimizerFactory | None = None,
        lr: float | None = None,
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
        **kwargs: Unpack[TemplateOptions],
    ):
        check_training(
            model,
            optimizer=optimizer,
            lr=lr,
            head=head,
            schedule=schedule,
            precision=precision,
            accumulation_steps=accumulation_steps,
            plugins=plugins,
        )
        defaults = LANGUAGE if find_host(model) else VISION
        schedule = schedule or defaults.numbers.schedule
        self.accumulation_steps = accumulation_steps
        set_precision(model, precision, device)
        plugins = _sharded_first(model, plugins or (), device)
        # On its device now: an optimizer of parameters that move later would train copies.
        model.to(device)
        optimizer = _make_optimizer(optimizer, lr, defaults, model)
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=defaults.criterion() if criterion is None else criterion,
            train_mb_size=train_mb_size or defaults.numbers.train_mb_size,
            train_epochs=defaults.numbers.train_epochs if train_epochs is None else train_epochs,
            eval_mb_size=eval_mb_size or defaults.numbers.eval_mb_size,
            device=device,
            plugins=[*plugins, *_own_plugins(head, schedule)],
            evaluator=defaults.evaluator if evaluator is default_evaluator else evaluator,
            **kwargs,
        )
        skip_check(model)  # this class checks before the first experience
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
                f"`experiences` should hold samples, but experience {experience.current_experience}"
                " has no samples. Leave it out of the stream."
            )
        check_classes(self.model, experience)
        if self.clock.train_exp_counter == 0:
            warn_of_other_preprocessing(self.model, experience)
            if lora_layers(self.model):
                self._check_gradients(**kwargs)
        super()._before_training_exp(**kwargs)

    def _check_gradients(self, **kwargs: Any) -> None:
        """Raises an error for an adapter or a classifier that training would not reach."""
        x = _first_samples(
            self.experience.dataset, min(TRACED_SAMPLES, self.train_mb_size), **kwargs
        )
        of_features = not isinstance(self._criterion, nn.CrossEntropyLoss) and not find_classifiers(
            self.model
        )
        check_gradients(self.model, x.to(self.device), of_features=of_features)

    def _before_eval_exp(self, **kwargs: Any) -> None:
        check_classes(self.model, self.experience)
        super()._before_eval_exp(**kwargs)


def _first_samples(
    dataset: Any, n: int, collate_fn: Callable[..., Any] | None = None, **_: Any
) -> torch.Tensor:
    """Returns the first samples of a dataset, and leaves the random generators as they were."""
    before = random_state()
    try:
        # Transforms of training may have generators of their own, but may be the only ones.
        for reading in (dataset.eval(), dataset.train()):
            samples = [reading[i] for i in range(min(n, len(reading)))]
            if isinstance(samples[0][0], torch.Tensor):
                break
        collate: Any = collate_fn or getattr(reading, "collate_fn", default_collate)
        x: torch.Tensor = collate(samples)[0]
    finally:
        set_random_state(before)
    return x[:, :TRACED_TOKENS] if hasattr(dataset, "lengths") else x  # token sequences


def _sharded_first(
    model: TrainableView, plugins: Sequence[SupervisedPlugin], device: str | torch.device
) -> list[SupervisedPlugin]:
    """The plugins in order, but those that distribute the model first; they do so here.

    Parameters are then equal in all processes, and gradients whole, before a plugin reads them.
    """
    sharding = [p for p in plugins if hasattr(p, "shard")]
    for plugin in sharding:
        plugin.shard(model, device)
    return [*sharding, *(p for p in plugins if p not in sharding)]


def _make_optimizer(
    optimizer: Optimizer | OptimizerFactory | None,
    lr: float | None,
    defaults: Training,
    model: nn.Module,
) -> Optimizer:
    if optimizer is None:
        optimizer = defaults.optimizer(lr)
    return optimizer if isinstance(optimizer, Optimizer) else optimizer(model.parameters())


def _own_plugins(head: str, schedule: str) -> list[SupervisedPlugin]:
    return [
        *head_plugins(head),
        FiniteLossPlugin(),
        *([CosineSchedulePlugin()] if schedule == "cosine" else []),
    ]


def check_training(
    model: nn.Module,
    *,
    optimizer: Optimizer | OptimizerFactory | None = None,
    lr: float | None = None,
    head: str = "linear",
    schedule: str | None = None,
    precision: str = "fp32",
    accumulation_steps: int = 1,
    plugins: Sequence[SupervisedPlugin] | None = None,
    **_: Any,
) -> None:
    """Raises an error for arguments that :class:`ParameterEfficientStrategy` cannot train with.

    The arguments are those of the strategy; others are ignored. Subclasses call this before they
    change the model.

    :raises ValueError: if an argument is out of range, or does not fit the model.
    """
    if lr is not None and optimizer is not None:
        raise ValueError(
            f"`lr` should be left out where `optimizer` is given, but is {lr}. Set the learning "
            "rate in the optimizer, such as functools.partial(torch.optim.Adam, lr=0.001)."
        )
    if lr is not None and not lr > 0:
        raise ValueError(f"`lr` should be above 0, but is {lr}. Leave it out for the default.")
    check_known("`head`", head, HEADS)
    check_known("`precision`", precision, PRECISIONS)
    if schedule is not None:
        check_known("`schedule`", schedule, SCHEDULES)
    check_accumulation(accumulation_steps, plugins or ())
    if head != "linear" and find_host(model) is not None:
        raise ValueError(
            f"`head` should be 'linear' for a language model, which has no classifier to re-train, "
            f"but is {head!r}. Leave it out."
        )
    if fits_head(head, plugins) and find_host(model) is None:
        classifier_of(model)  # raises where there is not one linear classifier


def fits_head(head: str, plugins: Sequence[SupervisedPlugin] | None) -> bool:
    """Returns whether the head is fitted after every task to the adapter used for prediction.

    :param head: argument of the strategy.
    :param plugins: argument of the strategy.
    """
    return head != "linear" or any(getattr(p, "fits_head", False) for p in plugins or ())

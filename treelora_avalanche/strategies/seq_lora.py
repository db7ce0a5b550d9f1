"""Sequential LoRA: one adapter, trained on one task after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from treelora_avalanche.adapters import (
    DEFAULT_LAYERS,
    LayerChoice,
    TrainableView,
    add_lora,
    find_classifier,
    lora_layers,
)
from treelora_avalanche.names import check_known
from treelora_avalanche.plugins import FiniteLossPlugin, TaskAdaptiveHeadPlugin
from treelora_avalanche.strategies.positional_model import positional_model
from treelora_avalanche.strategies.resumable import Resumable

logger = logging.getLogger(__name__)

HEADS: dict[str, Callable[[], list[SupervisedPlugin]]] = {
    "linear": list,
    "task_adaptive": lambda: [TaskAdaptiveHeadPlugin()],
}

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


@positional_model
class SeqLoRA(Resumable, SupervisedTemplate):
    """Plain LoRA, trained on one experience after the other with nothing against forgetting.

    The base of the other LoRA strategies, and what they are measured against. A plain timm model is
    enough: LoRA is attached here, and the classifier is trained beside it. ``strategy.model`` is a
    :class:`~treelora_avalanche.adapters.TrainableView` around the peft model. Task labels are not
    used.

    :param model: a pretrained model; or a model that carries LoRA already, which is taken as it is
        (``rank``, ``alpha``, ``layers`` and ``target_modules`` then have no say).
    :param optimizer: an optimizer, or a callable that makes one from parameters, such as
        ``functools.partial(torch.optim.Adam, lr=1e-3)``. The default is Adam at 0.005, as in the
        paper for ViTs.
    :param criterion: the loss, of logits ``(batch, n_classes)`` and targets ``(batch,)``.
    :param rank: rank of the LoRA factors.
    :param alpha: LoRA's output is scaled by ``alpha / rank``.
    :param layers: blocks to adapt: ``"first:k"``, ``"last:k"``, ``"all"`` or block numbers.
    :param target_modules: linear layers to adapt inside a block; by default the fused ``qkv``.
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
    :raises ValueError: if an argument is out of range or the model cannot be adapted; the model is
        then as it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | OptimizerFactory | None = None,
        criterion: nn.Module | Callable[..., torch.Tensor] | None = None,
        rank: int = 10,
        alpha: float = 10,
        layers: LayerChoice = DEFAULT_LAYERS,
        target_modules: Sequence[str] | None = None,
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
        if not lora_layers(model):
            model = add_lora(
                model, rank=rank, alpha=alpha, layers=layers, target_modules=target_modules
            )
        logger.info("LoRA adapts %s", ", ".join(lora_layers(model)))
        view = model if isinstance(model, TrainableView) else self._view(model)
        # On its device now: an optimizer made of parameters that move later would train copies.
        view.to(device)
        if optimizer is None:
            optimizer = partial(torch.optim.Adam, lr=0.005)
        if not isinstance(optimizer, Optimizer):
            optimizer = optimizer(view.parameters())
        super().__init__(
            model=view,
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

    def _view(self, model: nn.Module) -> TrainableView:
        """What :attr:`model` becomes, around a model with LoRA."""
        return TrainableView(model)

    def _before_training_exp(self, **kwargs: Any) -> None:
        experience = self.experience
        if len(experience.dataset) == 0:
            raise ValueError(
                f"experience {experience.current_experience} has no samples; "
                "leave it out of the stream."
            )
        classifier = find_classifier(self.model)
        largest = max(experience.classes_in_this_experience)
        if classifier is not None and largest >= classifier.out_features:
            raise ValueError(
                f"experience {experience.current_experience} has class {largest}, and the model's "
                f"classifier {classifier.out_features} outputs; make the model with "
                f"num_classes={largest + 1} or more."
            )
        super()._before_training_exp(**kwargs)

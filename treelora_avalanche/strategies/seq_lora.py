"""Sequential LoRA: one adapter, trained on one task after the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from treelora_avalanche.adapters import (
    LayerChoice,
    TrainableView,
    add_lora,
    lora_layers,
)
from treelora_avalanche.models.views.split_language import SplitLanguageModel, supports_split
from treelora_avalanche.models.views.split_vit import trainable_view
from treelora_avalanche.plugins import ActivationCachePlugin
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)

logger = logging.getLogger(__name__)


@positional_model
class SeqLoRA(ParameterEfficientStrategy):
    """Plain LoRA, trained on one experience after the other with nothing against forgetting.

    The base of the other LoRA strategies, and what they are measured against. A plain timm model is
    enough: LoRA is attached here, and the classifier is trained beside it. So is a
    :class:`~treelora_avalanche.models.LanguageModel`. ``strategy.model`` is a
    :class:`~treelora_avalanche.adapters.TrainableView` around the peft model. Task labels are not
    used.

    :param model: a pretrained model; or a model that carries LoRA already, which is taken as it is
        (``rank``, ``alpha``, ``layers`` and ``target_modules`` then have no say).
    :param rank: rank of the LoRA factors; by default 10, for language models 8.
    :param alpha: LoRA's output is scaled by ``alpha / rank``; by default 10, for language models
        32.
    :param layers: blocks to adapt: ``"first:k"``, ``"last:k"``, ``"all"`` or block numbers; by
        default the first five, for language models all.
    :param target_modules: linear layers to adapt inside a block; by default the fused ``qkv``, for
        language models queries and values.
    :param head: see :class:`ParameterEfficientStrategy`.
    :param cache: bytes of memory in which to keep what the blocks below the adapter make of the
        samples, ``"auto"`` or None: see :class:`~treelora_avalanche.plugins.ActivationCachePlugin`.
    :param compile: whether to compile the model by ``torch.compile``.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`ParameterEfficientStrategy`: optimizer, criterion, batch
        sizes, epochs, precision, device and evaluator.
    :raises ValueError: if an argument is out of range or the model cannot be adapted; the model is
        then as it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        rank: int | None = None,
        alpha: float | None = None,
        layers: LayerChoice | None = None,
        target_modules: Sequence[str] | None = None,
        head: str = "linear",
        cache: int | str | None = "auto",
        compile: bool = False,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        check_training(model, head=head, plugins=plugins, **kwargs)
        _check_answers_with_logits(model)
        prefix_cache = ActivationCachePlugin(cache)
        if not lora_layers(model):
            model = add_lora(
                model, rank=rank, alpha=alpha, layers=layers, target_modules=target_modules
            )
        logger.info("LoRA adapts %s", ", ".join(lora_layers(model)))
        view = model if isinstance(model, TrainableView) else self._view(model)
        if compile:
            view.compile()
        plugins = [*(plugins or ()), prefix_cache]
        super().__init__(model=view, head=head, plugins=plugins, **kwargs)

    def _view(self, model: nn.Module) -> TrainableView:
        """What :attr:`model` becomes, around a model with LoRA."""
        return SplitLanguageModel(model) if supports_split(model) else trainable_view(model)


def _check_answers_with_logits(model: nn.Module) -> None:
    inner = model.module if isinstance(model, TrainableView) else model
    inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    if isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"`model` is a {type(inner).__name__} of transformers, which does not answer with "
            "logits alone; wrap it as `treelora_avalanche.models.LanguageModel(model, tokenizer)`, "
            "or make it with `create_language_model` or `create_text_encoder`."
        )

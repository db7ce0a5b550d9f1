"""Sequential LoRA: one adapter, fine-tuned on one task after the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import (
    LayerChoice,
    TrainableView,
    add_lora,
    lora_layers,
)
from treelora_avalanche.adapters.graph import check_trainable
from treelora_avalanche.adapters.other_libraries import check_not_torchvision
from treelora_avalanche.choices import MERGES, check_known
from treelora_avalanche.models.views.split_language import SplitLanguageModel, supports_split
from treelora_avalanche.models.views.split_vit import trainable_view
from treelora_avalanche.plugins import ActivationCachePlugin, MergedAdapterPlugin
from treelora_avalanche.strategies.base.arguments import TrainingOptions
from treelora_avalanche.strategies.base.outputs import check_returns_logits
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)

logger = logging.getLogger(__name__)


class SeqLoRA(ParameterEfficientStrategy):
    """Plain LoRA (Hu et al., ICLR 2022, arXiv 2106.09685), without measures against forgetting.

    The adapted weight is ``W + (alpha / rank) B A``. The baseline of the LoRA strategies, and their
    base class. LoRA is attached here with PEFT, and the classifier is trained with it;
    ``strategy.model`` is a :class:`~treelora_avalanche.adapters.TrainableView` around the peft
    model. Stores nothing per task. Task labels are not used.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
        strategy = SeqLoRA(model, rank=10, layers="first:5", lr=0.005, head="task_adaptive")
        for experience in benchmark.train_stream:
            strategy.train(experience)
            strategy.eval(benchmark.test_stream)

    :param model: a pretrained timm model or a :class:`~treelora_avalanche.models.LanguageModel`; a
        model that carries LoRA already is used unchanged (``rank``, ``alpha``, ``dropout``,
        ``layers`` and ``target_modules`` are then ignored).
    :param rank: rank of the LoRA factors; default 10, for language models 8.
    :param alpha: LoRA's output is scaled by ``alpha / rank``; default 10, for language models 32.
    :param dropout: share of the inputs of LoRA that training sets to 0, in [0, 1).
    :param layers: adapted blocks: ``"first:k"``, ``"last:k"``, ``"all"`` or block numbers; default
        the first five, for language models all.
    :param target_modules: adapted linear layers inside a block, or modules of it, such as
        ``["mlp"]``, for all of their linear layers; default the fused ``qkv`` (or
        ``q_proj``, ``k_proj``, ``v_proj``), for language models queries and values.
    :param cache: memory in bytes for the cached outputs of the frozen blocks below the adapter,
        ``"auto"`` or None, see :class:`~treelora_avalanche.plugins.ActivationCachePlugin`.
    :param compile: whether to compile the model with ``torch.compile``.
    :param merge: how the adapters of all tasks are merged into one for prediction, ``"mean"``,
        ``"ties"`` or ``"magmax"`` (:class:`~treelora_avalanche.plugins.MergedAdapterPlugin`);
        ``"none"`` predicts with that of the last task.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of
        :class:`~treelora_avalanche.strategies.base.parameter_efficient.ParameterEfficientStrategy`.
    :raises ValueError: if an argument is out of range or the model cannot be adapted; the model is
        then unchanged. The first ``train`` raises one, before any step, if an adapter gets no
        gradient or the classifier is frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        layers: LayerChoice | None = None,
        target_modules: Sequence[str] | None = None,
        cache: int | str | None = "auto",
        compile: bool = False,
        merge: str = "none",
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[TrainingOptions],
    ):
        check_not_torchvision(model, target_modules)
        check_training(model, plugins=plugins, **kwargs)
        check_returns_logits(model)
        check_known("`merge`", merge, MERGES)
        # First: what other plugins store, and the head that is fitted, are of the merged adapter.
        merging = [] if merge == "none" else [MergedAdapterPlugin(merge)]
        plugins = [*merging, *(plugins or ())]
        activation_cache = ActivationCachePlugin(cache)
        check_trainable(model)
        if not lora_layers(model):
            model = add_lora(
                model,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                layers=layers,
                target_modules=target_modules,
            )
        logger.info("LoRA adapts %s", ", ".join(lora_layers(model)))
        view = model if isinstance(model, TrainableView) else self._view(model)
        if compile:
            view.compile()
        super().__init__(model=view, plugins=[*plugins, activation_cache], **kwargs)

    def _view(self, model: nn.Module) -> TrainableView:
        """The view of a model with LoRA that becomes :attr:`model`."""
        return SplitLanguageModel(model) if supports_split(model) else trainable_view(model)

"""Orthogonal subspace fine-tuning (Nayak et al., ICLR 2026, arXiv 2504.07097)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import (
    LayerChoice,
    TrainableView,
    find_adaptable_layers,
    find_host,
    lora_layers,
)
from treelora_avalanche.adapters.attach import call_projections
from treelora_avalanche.adapters.classifier import find_classifiers
from treelora_avalanche.adapters.trainable_view import HALF
from treelora_avalanche.models.views.precision import compute_in_float32
from treelora_avalanche.models.views.split_language import SplitLanguageModel, supports_split
from treelora_avalanche.models.views.split_vit import trainable_view
from treelora_avalanche.plugins import ActivationCachePlugin, OSFPlugin
from treelora_avalanche.plugins.baselines.osf import network_of
from treelora_avalanche.strategies.base.arguments import TrainingOptions
from treelora_avalanche.strategies.base.outputs import check_returns_logits
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)


class OSF(ParameterEfficientStrategy):
    """Full-rank fine-tuning off the largest singular directions of the weights, by peft's OSF.

    For the method see :class:`~treelora_avalanche.plugins.OSFPlugin`. It trains the weights of the
    layers that LoRA methods adapt, and the classifier; no bias. The paper chooses each layer's rank
    by its importance, which peft leaves out: here all layers preserve the same share. Stores
    nothing per task. Task labels are not used.

    Example::

        strategy = OSF(model, layers="first:5", lr=1e-4)

    :param model: a pretrained model without LoRA, see :class:`SeqLoRA`.
    :param layers: see :class:`SeqLoRA`.
    :param target_modules: see :class:`SeqLoRA`.
    :param cache: see :class:`SeqLoRA`.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of
        :class:`~treelora_avalanche.strategies.base.parameter_efficient.ParameterEfficientStrategy`.
    :raises ValueError: if an argument is out of range or the model cannot be adapted; the model is
        then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerChoice | None = None,
        target_modules: Sequence[str] | None = None,
        cache: int | str | None = "auto",
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[TrainingOptions],
    ):
        inner = cast(nn.Module, model.module) if isinstance(model, TrainableView) else model
        check_training(inner, plugins=plugins, **kwargs)
        check_returns_logits(inner)
        activation_cache = ActivationCachePlugin(cache)
        names = _layers_to_train(inner, layers, target_modules)
        osf = OSFPlugin(names)
        _train_only(inner, names)
        view = SplitLanguageModel(inner) if supports_split(inner) else trainable_view(inner)
        super().__init__(model=view, plugins=[*(plugins or ()), osf, activation_cache], **kwargs)


def _layers_to_train(
    model: nn.Module, layers: LayerChoice | None, target_modules: Sequence[str] | None
) -> list[str]:
    if lora_layers(model):
        raise ValueError(
            "`model` should carry no LoRA for OSF, which trains the weights themselves, but does. "
            "Pass the pretrained model."
        )
    names = find_adaptable_layers(model, layers, target_modules)
    network = network_of(model)
    for name in names:
        layer = network.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"`model` should have nn.Linear layers for peft's OSF, but `{name}` is a "
                f"{type(layer).__name__}. Use another model or method."
            )
    return names


def _train_only(model: nn.Module, names: Sequence[str]) -> None:
    """Freezes all but the named layers' weights, which become float32, and the classifier."""
    model.requires_grad_(False)
    network = network_of(model)
    call_projections(network, names)
    for classifier in find_classifiers(model).values():
        classifier.requires_grad_(True)
    for name in names:
        layer: Any = network.get_submodule(name)
        layer.weight.requires_grad_(True)
        dtype: torch.dtype = layer.weight.dtype
        if dtype in HALF and find_host(model) is not None:  # others are converted with their view
            compute_in_float32(layer, dtype)

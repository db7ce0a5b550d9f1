"""Features of the frozen backbone of a model with adapters or prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters import TrainableView, disabled_adapters, lora_layers
from treelora_avalanche.adapters.trainable_view import active_forward
from treelora_avalanche.models.features.extraction import recorded_features
from treelora_avalanche.models.prompts.vit import PromptedViT
from treelora_avalanche.models.views.router import RoutedView
from treelora_avalanche.models.views.split_vit import SplitViT


def check_frozen_backbone(model: nn.Module) -> None:
    """Raises an error for a model without adapters or prompts, whose backbone may be trained.

    :param model: a model, or a view of one.
    :raises ValueError: if it has none.
    """
    if not lora_layers(model) and not isinstance(_plain(model), PromptedViT):
        raise ValueError(
            "`head` should be 'task_adaptive' for a model without adapters or prompts, which keeps "
            "no frozen backbone, but is 'task_adaptive_ensemble'."
        )


@torch.no_grad()
def frozen_features(model: nn.Module, samples: Any) -> Tensor:
    """Returns the features of the backbone without adapters or prompts, ``(batch, dim)``.

    ``frozen_features(model, images)`` are those before training, bit for bit.

    :param model: a model with adapters or prompts, in evaluation mode; see
        :func:`check_frozen_backbone`.
    :param samples: a batch, as the model takes it.
    """
    if isinstance(model, RoutedView):
        return model.frozen_features(samples)
    plain = _plain(model)
    if isinstance(plain, PromptedViT) and isinstance(model, TrainableView):
        with model.autocasting():
            return plain.query(samples)
    with disabled_adapters(model):
        if isinstance(model, SplitViT):
            return model.features(samples)
        with recorded_features(model) as features:
            active_forward(model)(samples)
    return features[0]


def _plain(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, TrainableView) else model

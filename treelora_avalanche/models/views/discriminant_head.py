"""Head that classifies features by regularised discriminants, in place of a linear classifier."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.adapters.trainable_view import at_least_float32
from treelora_avalanche.models.features.regularised import RegularisedDiscriminant
from treelora_avalanche.models.views.frozen import frozen_features
from treelora_avalanche.models.views.router import RoutedView
from treelora_avalanche.models.views.split_vit import SplitViT, Start


class DiscriminantHead(NamedTuple):
    """Returns the log-probabilities of a discriminant in place of the logits of a model.

    With a second discriminant, of the features of the frozen backbone, the two log-probabilities
    are averaged: ``(1 - share) log p(y | adapted features) + share log p(y | frozen features)``,
    normalised. That costs a second pass; where the adapter leaves the lower blocks frozen, these
    are computed once for both. The linear classifier keeps its weights. A deep copy of the model
    has the head, too. Example::

        handles = DiscriminantHead(RegularisedDiscriminant.fit(statistics)).attach(model)
        model(images)  # log-probabilities, -inf for classes without statistics
        for handle in handles:
            handle.remove()

    :param adapted: discriminant of the features under the active adapter.
    :param frozen: discriminant of the features of the frozen backbone; None for none.
    :param share: weight of ``frozen``, in [0, 1].
    """

    adapted: RegularisedDiscriminant
    frozen: RegularisedDiscriminant | None = None
    share: float = 0.0

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Attaches the head to a model, by hooks.

        :param model: a model with a linear classifier.
        :return: the handles that remove it.
        """
        handles = [classifier_of(model).register_forward_hook(self._classify)]
        if self.frozen is not None:
            handles.append(model.register_forward_pre_hook(_start))
            handles.append(model.register_forward_hook(self._average))
        return handles

    def _classify(
        self, classifier: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        return _scores(self.adapted, inputs[0], output)

    def _average(self, model: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self.frozen is not None
        frozen = _scores(self.frozen, frozen_features(model, inputs[0]), output)
        return ((1 - self.share) * output + self.share * frozen).log_softmax(1)


def _scores(discriminant: RegularisedDiscriminant, features: Tensor, output: Tensor) -> Tensor:
    """Log-probabilities in the columns of the classes, -inf in the others."""
    with torch.autocast(output.device.type, enabled=False):
        found = discriminant.log_probabilities(features)
        scores = at_least_float32(output).new_full(output.shape, float("-inf"))
        return scores.index_copy(1, discriminant.classes, found.to(scores))


def _start(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Computes the frozen blocks of images once for the two passes."""
    if not isinstance(model, SplitViT) or isinstance(model, RoutedView) or not model.n_frozen:
        return None
    return None if isinstance(inputs[0], Start) else (model.start(inputs[0]),)

"""Features: what a model hands to its classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.adapters.trainable_view import evaluating

if TYPE_CHECKING:
    from treelora_avalanche.processes import Processes


def extract_features(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int,
    device: torch.device | str,
    processes: Processes | None = None,
) -> tuple[Tensor, Tensor]:
    """Features of all samples of a dataset, in evaluation mode.

    :param model: any model with a linear classifier.
    :param dataset: samples whose first two elements are an image and its class.
    :param batch_size: samples per forward pass.
    :param device: where the model is.
    :param processes: those that divide the samples, and of which each gets all features.
    :return: features ``(n_samples, dim)`` and classes ``(n_samples,)``, on the device.
    """
    features: list[Tensor] = []
    targets: list[Tensor] = []
    classifier = classifier_of(model)
    n_samples = len(dataset)
    if processes is not None:
        dataset = Subset(dataset, processes.part(n_samples, batch_size))
    # A view may route its samples elsewhere; the features are those of the live adapter.
    live = model.live if isinstance(model, TrainableView) else model
    hook = classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        with evaluating(model):
            for images, target, *_ in DataLoader(dataset, batch_size):
                live(images.to(device))
                targets.append(target.to(device))
    finally:
        hook.remove()
    found, classes = torch.cat(features).to(classifier.weight.dtype), torch.cat(targets)
    if processes is not None:
        found, classes = (processes.whole(f, n_samples, batch_size) for f in (found, classes))
    return found, classes

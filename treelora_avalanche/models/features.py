"""Features: what a model hands to its classifier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from treelora_avalanche.adapters import TrainableView, find_classifier

if TYPE_CHECKING:
    from treelora_avalanche.processes import Processes


def classifier_of(model: nn.Module) -> nn.Linear:
    """The linear classifier of a model.

    :param model: a model with a linear classifier, with or without LoRA.
    :raises ValueError: if it has none.
    """
    classifier = find_classifier(model)
    if classifier is None:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no linear classifier whose inputs could be its "
            "features; make it with num_classes above 0."
        )
    return classifier


def check_classes(model: nn.Module, experience: Any) -> None:
    """Raise an error if an experience has classes for which the classifier has no output.

    Said before the loss does: on a GPU, that ends the process and names neither.

    :param model: any model; one without a linear classifier, as a language model, is not looked at.
    :param experience: an experience to train or evaluate.
    :raises ValueError: if the classifier is too small.
    """
    classifier = find_classifier(model)
    if classifier is None:
        return
    largest = max(experience.classes_in_this_experience, default=-1)
    if largest >= classifier.out_features:
        raise ValueError(
            f"experience {experience.current_experience} has class {largest}, and the model's "
            f"classifier {classifier.out_features} outputs; make the model with "
            f"num_classes={largest + 1} or more."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


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

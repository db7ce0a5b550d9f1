"""Finds a model's linear classifier."""

from __future__ import annotations

from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from treelora_avalanche.adapters.trainable_view import TrainableView


def classifier_name(model: nn.Module) -> str | None:
    """Name of a plain model's linear classifier: timm tells; else the usual names are tried."""
    get_classifier = getattr(model, "get_classifier", None)
    head: object = get_classifier() if callable(get_classifier) else None
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return str(name)
    usual = ("classifier", "score", "head", "fc")
    return next((n for n in usual if isinstance(getattr(model, n, None), nn.Linear)), None)


def find_classifier(model: nn.Module) -> nn.Linear | None:
    """The linear classifier that is in use: the trained copy where peft keeps one.

    :param model: a plain model, or one with LoRA; with or without a :class:`TrainableView`.
    :return: None where the model has no linear classifier.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            live = module.modules_to_save[module.active_adapters[0]]
            return live if isinstance(live, nn.Linear) else None
    plain = model.module if isinstance(model, TrainableView) else model
    name = classifier_name(plain)
    found = plain.get_submodule(name) if name else None
    return found if isinstance(found, nn.Linear) else None


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

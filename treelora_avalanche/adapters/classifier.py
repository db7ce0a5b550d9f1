"""Lookup of a model's linear classifier."""

from __future__ import annotations

from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from treelora_avalanche.adapters.trainable_view import TrainableView
from treelora_avalanche.experiences import classes_of


def classifier_name(model: nn.Module) -> str | None:
    """Returns the name of a plain model's linear classifier, None if it has none.

    It is timm's ``get_classifier()``, or else a ``classifier``, ``score``, ``head`` or ``fc``.

    :param model: a model without LoRA.
    """
    get_classifier = getattr(model, "get_classifier", None)
    head: object = get_classifier() if callable(get_classifier) else None
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return str(name)
    usual = ("classifier", "score", "head", "fc")
    return next((n for n in usual if isinstance(getattr(model, n, None), nn.Linear)), None)


def find_classifier(model: nn.Module) -> nn.Linear | None:
    """Returns the linear classifier in use, which is peft's trainable copy if there is one::

        find_classifier(timm.create_model("vit_tiny_patch16_224")).out_features  # 1000

    :param model: a plain model, or one with LoRA; with or without a :class:`TrainableView`.
    :return: None where the model has no linear classifier.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            active = module.modules_to_save[module.active_adapters[0]]
            return active if isinstance(active, nn.Linear) else None
    plain = model.module if isinstance(model, TrainableView) else model
    name = classifier_name(plain)
    found = plain.get_submodule(name) if name else None
    return found if isinstance(found, nn.Linear) else None


def classifier_of(model: nn.Module) -> nn.Linear:
    """Returns the linear classifier of a model that must have one.

    :param model: a model with a linear classifier, with or without LoRA.
    :raises ValueError: if it has none.
    """
    classifier = find_classifier(model)
    if classifier is None:
        raise ValueError(
            f"`model` should have a linear classifier, whose inputs are the features, but this "
            f"{type(model).__name__} has none. Make it with num_classes above 0."
        )
    return classifier


def check_classes(model: nn.Module, experience: Any) -> None:
    """Raises an error if an experience has classes for which the classifier has no output.

    The loss would raise a less clear one, and on a GPU end the process.

    :param model: any model; one without a linear classifier, such as a language model, passes.
    :param experience: an experience to train or evaluate.
    :raises ValueError: if the classifier is too small.
    """
    classifier = find_classifier(model)
    if classifier is None:
        return
    largest = max(classes_of(experience), default=-1)
    if largest >= classifier.out_features:
        raise ValueError(
            f"the model's classifier should have an output for class {largest} of experience "
            f"{experience.current_experience}, but has {classifier.out_features} outputs. Make the "
            f"model with num_classes={largest + 1} or more."
        )

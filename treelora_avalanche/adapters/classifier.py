"""Lookup of a model's linear classifier."""

from __future__ import annotations

from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from treelora_avalanche.adapters.trainable_view import TrainableView
from treelora_avalanche.experiences import classes_of

_USUAL = ("classifier", "score", "head", "fc")


def classifier_name(model: nn.Module) -> str | None:
    """Returns the name of a plain model's linear classifier, None if it has none.

    It is timm's ``get_classifier()``, or else a ``classifier``, ``score``, ``head`` or ``fc``.

    :param model: a model without LoRA.
    """
    names = classifier_names(model)
    linear = len(names) == 1 and isinstance(model.get_submodule(names[0]), nn.Linear)
    return names[0] if linear else None


def classifier_names(model: nn.Module) -> list[str]:
    """Returns the names of the modules that produce a model's logits; none without classifier.

    A model may have several, such as a distilled DeiT, whose logits are the mean of two, and each
    may have any layers::

        classifier_names(timm.create_model("deit_tiny_distilled_patch16_224"))
        # ["head", "head_dist"]

    :param model: a model, with or without LoRA; see :func:`classifier_name`.
    """
    heads = _heads_of(model) or _usual_head(model)
    if not heads:  # perhaps a wrapper around a model of timm
        inner = (m for m in model.modules() if hasattr(type(m), "get_classifier"))
        heads = _heads_of(next(inner, model))
    chosen = {id(head) for head in heads}
    return [name for name, module in model.named_modules() if id(module) in chosen]


def _heads_of(model: nn.Module) -> list[nn.Module]:
    """Returns the classifiers that ``get_classifier()`` of a model gives, if they have weights."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    heads: Any = get_classifier() if callable(get_classifier) else None
    heads = heads if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]
    return [head for head in heads if _has_parameters(head)]


def _usual_head(model: nn.Module) -> list[nn.Module]:
    """Returns the module with a usual name for a classifier; a linear one before others."""
    named: list[Any] = [getattr(model, name, None) for name in _USUAL]
    usual = [module for module in named if _has_parameters(module)]
    linear = [module for module in usual if isinstance(_active(module), nn.Linear)]
    return (linear or usual)[:1]


def _has_parameters(module: object) -> bool:
    return isinstance(module, nn.Module) and next(module.parameters(), None) is not None


def _active(module: Any) -> Any:
    """Returns peft's trainable copy of a module, or the module if it has none."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    return module


def find_classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules in use that produce the logits, by name; see :func:`classifier_names`.

    :param model: a plain model, or one with LoRA; with or without a :class:`TrainableView`.
    """
    plain = model.module if isinstance(model, TrainableView) else model
    names = classifier_names(plain)
    saved = {n: m for n, m in plain.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    if not saved.keys() & set(names):  # a user's own `modules_to_save`
        linear = [name for name, m in saved.items() if isinstance(_active(m), nn.Linear)]
        names = linear or names
    prefix = "base_model.model."
    return {name.rpartition(prefix)[2]: _active(plain.get_submodule(name)) for name in names}


def find_classifier(model: nn.Module) -> nn.Linear | None:
    """Returns the linear classifier in use, which is peft's trainable copy if there is one::

        find_classifier(timm.create_model("vit_tiny_patch16_224")).out_features  # 1000

    :param model: a plain model, or one with LoRA; with or without a :class:`TrainableView`.
    :return: None where the model has no classifier, several, or one that is not linear.
    """
    found = list(find_classifiers(model).values())
    return found[0] if len(found) == 1 and isinstance(found[0], nn.Linear) else None


def classifier_of(model: nn.Module) -> nn.Linear:
    """Returns the linear classifier of a model that must have one.

    :param model: a model with a linear classifier, with or without LoRA.
    :raises ValueError: if it has none, several, or one that is not linear.
    """
    classifier = find_classifier(model)
    if classifier is not None:
        return classifier
    found = find_classifiers(model)
    if not found:
        raise ValueError(
            f"`model` should have a linear classifier, whose inputs are the features, but this "
            f"{type(model).__name__} has none. Make it with num_classes above 0."
        )
    parts = " and ".join(f"`{name}` ({type(module).__name__})" for name, module in found.items())
    raise ValueError(
        f"`model` should have a linear classifier, whose inputs are the features, but its logits "
        f"come from {parts}. Replace them by one nn.Linear, or train them by the loss alone, with "
        "head='linear' and no plugin that fits the head."
    )


def _n_outputs(classifier: nn.Module) -> int | None:
    """Returns the number of outputs of a classifier's last linear layer."""
    linear = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    return linear[-1].out_features if linear else None


def check_classes(model: nn.Module, experience: Any) -> None:
    """Raises an error if an experience has classes for which the classifier has no output.

    The loss would raise a less clear one, and on a GPU end the process.

    :param model: any model; one without a classifier, such as a language model, passes.
    :param experience: an experience to train or evaluate.
    :raises ValueError: if the classifier is too small.
    """
    sizes = [n for n in map(_n_outputs, find_classifiers(model).values()) if n is not None]
    if not sizes:
        return
    largest = max(classes_of(experience), default=-1)
    if largest >= min(sizes):
        raise ValueError(
            f"the model's classifier should have an output for class {largest} of experience "
            f"{experience.current_experience}, but has {min(sizes)} outputs. Make the "
            f"model with num_classes={largest + 1} or more."
        )

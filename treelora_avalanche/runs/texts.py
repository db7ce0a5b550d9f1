"""What a run on texts is made of: a language model, and a stream by the name of its scenario."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers.utils.logging import disable_progress_bar

from treelora_avalanche import models, scenarios
from treelora_avalanche.adapters import lora_layers
from treelora_avalanche.registry.methods import Method
from treelora_avalanche.registry.settings import EQUAL_EPOCHS, RunSettings
from treelora_avalanche.tree import MAX_DEPTH


def language_model(settings: RunSettings, dtype: str) -> nn.Module:
    """The pretrained model.

    :param settings: the settings.
    :param dtype: of its frozen weights.
    :raises OSError: if its weights are not there and cannot be fetched.
    """
    if not sys.stderr.isatty():  # a bar would be a line for each of its steps there
        disable_progress_bar()
    return models.create_language_model(
        str(settings.model),
        dtype=dtype,
        max_length=settings.max_length,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def epochs_per_task(entry: Method, wanted: list[int] | str, names: list[str]) -> list[int]:
    """Passes over the data of each task.

    :param entry: the method.
    :param wanted: as in `RunSettings.epochs_per_task`.
    :param names: of the tasks.
    :raises ValueError: if there is not one number for each task.
    """
    if isinstance(wanted, str):
        if wanted == EQUAL_EPOCHS or entry.has_tree:
            numbers = scenarios.TREELORA_EPOCHS
        else:
            whole = entry.kind == "Avalanche's" and not entry.uses_lora
            numbers = scenarios.FULL_EPOCHS if whole else scenarios.LORA_EPOCHS
        return [numbers[name] for name in names]
    if len(wanted) != len(names):
        raise ValueError(
            f"`--epochs_per_task` has {len(wanted)} numbers, but there are {len(names)} tasks: "
            f"{', '.join(names)}"
        )
    return wanted


def training_in_words(strategy: Any, config: dict[str, Any], epochs: list[int]) -> str:
    """How a language model is trained, defaults filled in.

    :param strategy: the strategy, before its first task.
    :param config: of the run.
    :param epochs: of each task.
    """
    layers = lora_layers(strategy.model)
    words = [
        f"LoRA of rank {config['rank']} (α {config['alpha']:g}) on {len(layers)} matrices"
        if layers
        else _trained_without_lora(strategy.model),
        f"learning rate {config['lr']:g}",
        f"batches of {config['batch_size']}",
        f"epochs {', '.join(map(str, epochs))}",
    ]
    if "tree_lambda" in config:
        depth = config["depth"] or min(len(layers), MAX_DEPTH)
        words.append(f"λ {config['tree_lambda']:g}, a tree of depth {depth}")
    return "trains " + "; ".join(words)


def _trained_without_lora(model: nn.Module) -> str:
    # All of them, where a view shows the trained ones alone.
    parameters = [parameter for _, parameter in nn.Module.named_parameters(model)]
    if all(parameter.requires_grad for parameter in parameters):
        return "every weight"
    n_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return f"{n_trained:,} values of prompts and keys" if n_trained else "nothing"


__all__ = ["epochs_per_task", "language_model", "training_in_words"]

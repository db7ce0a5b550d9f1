"""What a run is made of: device, configuration, stream and backbone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from transformers.utils.logging import disable_progress_bar

from treelora_avalanche import models, scenarios
from treelora_avalanche.registry.methods import Method, find_method
from treelora_avalanche.registry.settings import DIGITS_VIT, RunSettings
from treelora_avalanche.registry.streams import IMAGE_STREAMS, TEXT_STREAMS, data_folder
from treelora_avalanche.runs.config import find_device, resolve_config, weights_dtype


@dataclass(frozen=True)
class Ingredients:
    """What all methods share under one seed: the stream and the pretrained backbone."""

    seed: int
    benchmark: Any
    backbone: nn.Module


# --------------------------------------------------------------------------------------------------
# Streams, by the name of their scenario; digits bring their own model and are made below


def prepare(seed: int, settings: RunSettings) -> Ingredients:
    """Build the stream and the backbone. This is where wrong data or weights are noticed.

    :param seed: seed of the class order, of the backbone's head and, for digits, of its
        pretraining.
    :param settings: the settings.
    """
    RNGManager.set_random_seeds(seed)
    benchmark: Any
    if settings.model_name == DIGITS_VIT:
        benchmark = scenarios.SplitDigits(settings.number_of_experiences, seed=seed)
        return Ingredients(seed, benchmark, models.pretrained_digits_vit(seed))
    if settings.on_language:
        data_folder(settings)  # what is missing here is noticed before gigabytes are fetched
        model = language_model(settings, weights_dtype(settings, find_device(settings.device)))
        return Ingredients(seed, TEXT_STREAMS[settings.scenario](settings, model), model)
    # The number of classes comes from the data, whose preprocessing comes from the model.
    unweighted = models.create_vit(
        settings.model_name, num_classes=0, img_size=settings.img_size, pretrained=False
    )
    build = IMAGE_STREAMS[settings.scenario]
    benchmark = build(settings, seed, models.image_preprocessing(unweighted))
    backbone = models.create_vit(
        settings.model_name,
        num_classes=benchmark.n_classes,
        checkpoint=settings.checkpoint,
        img_size=settings.img_size,
    )
    return Ingredients(seed, benchmark, backbone)


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


def check_arguments(
    methods: Sequence[str], settings: RunSettings, ingredients: Ingredients
) -> None:
    """Build each method and let it go, so that wrong arguments are noticed before any training.

    :param methods: names of the methods.
    :param settings: the settings.
    :param ingredients: the stream and the backbone.
    :raises ValueError: if a method cannot be built with these settings on this backbone.
    """
    for method in methods:
        config = resolve_config(method, ingredients.seed, settings)
        try:
            build_strategy(
                find_method(method),
                settings,
                config,
                ingredients,
                device=torch.device("cpu"),
                plugins=[],
                evaluator=EvaluationPlugin(loggers=[]),
            )
        except ValueError:
            raise
        except Exception:
            # Not an argument's fault: it happens again where the method's own run can report it.
            continue


def build_strategy(
    entry: Method,
    settings: RunSettings,
    config: dict[str, Any],
    ingredients: Ingredients,
    **shared: Any,
) -> Any:
    return entry.build(
        copy.deepcopy(ingredients.backbone),
        settings,
        config.get("lr", 0.0),
        ingredients.seed,
        {
            "train_mb_size": settings.batch_size,
            "train_epochs": entry.epochs(settings),  # and set before each task
            "eval_mb_size": settings.eval_batch_size,
            **shared,
        },
    )


__all__ = ["Ingredients", "check_arguments", "language_model", "prepare"]

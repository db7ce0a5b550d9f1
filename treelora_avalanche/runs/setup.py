"""Builds what a run needs: the stream, the pretrained backbone and the strategy."""

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

from treelora_avalanche import models
from treelora_avalanche.registry.entry_points import RegistrationError, load_object
from treelora_avalanche.registry.families import SharedArguments
from treelora_avalanche.registry.methods import METHODS
from treelora_avalanche.registry.scenarios import SCENARIOS
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.registry.streams import build_stream, data_folder
from treelora_avalanche.runs.config import find_device, of_method, weights_dtype


@dataclass(frozen=True)
class Ingredients:
    """What all methods share under one seed: the stream and the pretrained backbone."""

    seed: int
    benchmark: Any
    backbone: nn.Module


def prepare(seed: int, settings: RunSettings) -> Ingredients:
    """Builds the stream and the backbone. This is where wrong data or weights are noticed.

    :param seed: seed of the class order, of the backbone's head and, for digits, of its
        pretraining.
    :param settings: the settings.
    """
    RNGManager.set_random_seeds(seed)
    scenario = SCENARIOS[settings.scenario]
    if scenario.backbone is not None:
        benchmark = build_stream(settings, seed)
        return Ingredients(seed, benchmark, load_object(scenario.backbone)(seed))
    if settings.on_language:
        data_folder(settings)  # what is missing here is noticed before gigabytes are fetched
        model = language_model(settings, weights_dtype(settings, find_device(settings.device)))
        return Ingredients(seed, build_stream(settings, seed, model=model), model)
    # The number of classes comes from the data, whose preprocessing comes from the model.
    unweighted = models.create_vit(
        settings.model_name, num_classes=0, img_size=settings.img_size, pretrained=False
    )
    preprocessing = models.image_preprocessing(unweighted)
    benchmark = build_stream(settings, seed, preprocessing=preprocessing)
    backbone = models.create_vit(
        settings.model_name,
        num_classes=benchmark.n_classes,
        checkpoint=settings.checkpoint,
        img_size=settings.img_size,
    )
    return Ingredients(seed, benchmark, backbone)


def language_model(settings: RunSettings, dtype: str) -> nn.Module:
    """Returns the pretrained language model.

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


def build_strategy(
    method: str, settings: RunSettings, ingredients: Ingredients, **shared: Any
) -> Any:
    """Builds the strategy of a method on a copy of the backbone.

    :param method: name of the method.
    :param settings: the settings of all methods.
    :param ingredients: the stream and the backbone.
    :param shared: ``device``, ``plugins`` and ``evaluator``.
    :raises ValueError: if it cannot be built with these settings on this backbone.
    """
    entry = METHODS[method]
    own_settings, options = of_method(method, settings)
    shared["train_mb_size"] = own_settings.batch_size
    shared["train_epochs"] = 1  # and set before each stage, see Schedule
    shared["eval_mb_size"] = own_settings.eval_batch_size
    return entry.build(
        SharedArguments(
            model=copy.deepcopy(ingredients.backbone),
            settings=own_settings,
            lr=entry.lr(own_settings) or 0.0,
            seed=ingredients.seed,
            options=options,
            shared=shared,
        )
    )


def check_arguments(
    methods: Sequence[str], settings: RunSettings, ingredients: Ingredients
) -> None:
    """Builds each method and drops it, so that wrong arguments are noticed before any training.

    :param methods: names of the methods.
    :param settings: the settings.
    :param ingredients: the stream and the backbone.
    :raises ValueError: if a method cannot be built with these settings on this backbone.
    """
    device = torch.device("cpu")
    for method in methods:
        evaluator = EvaluationPlugin(loggers=[])
        try:
            build_strategy(
                method, settings, ingredients, device=device, plugins=[], evaluator=evaluator
            )
        except RegistrationError:
            continue  # another package's fault, which the method's own run reports
        except ValueError:
            raise
        except Exception:
            continue  # not an argument's fault either


__all__ = ["Ingredients", "build_strategy", "check_arguments", "language_model", "prepare"]

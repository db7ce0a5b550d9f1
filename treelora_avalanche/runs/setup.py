"""Builds the stream, the pretrained backbone and the strategy of a run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
    """Stream and pretrained backbone, shared by all methods under one seed.

    >>> Ingredients(0, SplitDigits(5), pretrained_digits_vit(0))

    :param seed: the seed.
    :param benchmark: the stream.
    :param backbone: the backbone, which each strategy copies.
    :param known: fingerprints of their files, by path; filled by the first run that needs them.
    """

    seed: int
    benchmark: Any
    backbone: nn.Module
    known: dict[Path, str] = field(default_factory=dict)


def prepare(seed: int, settings: RunSettings) -> Ingredients:
    """Builds the stream and the backbone.

    :param seed: seed of the class order, of the backbone's head and, for digits, of its
        pretraining.
    :param settings: the settings.
    :raises ValueError: if the data or the weights cannot be used.
    :raises OSError: if they are missing and cannot be downloaded.
    """
    RNGManager.set_random_seeds(seed)
    scenario = SCENARIOS[settings.scenario]
    if scenario.backbone is not None:
        benchmark = build_stream(settings, seed)
        return Ingredients(seed, benchmark, load_object(scenario.backbone)(seed))
    if settings.on_language:
        data_folder(settings)  # raises before gigabytes of weights are downloaded
        model = language_model(settings, weights_dtype(settings, find_device(settings.device)))
        return Ingredients(seed, build_stream(settings, seed, model=model), model)
    # The model's head needs the number of classes; the data need the model's preprocessing.
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
    :param dtype: dtype of the frozen weights.
    :raises OSError: if the weights are missing and cannot be downloaded.
    """
    if not sys.stderr.isatty():  # in a file, a progress bar is a line per update
        disable_progress_bar()
    return models.create_language_model(
        str(settings.model),
        dtype=dtype,
        max_length=settings.max_length,
        gradient_checkpointing=settings.gradient_checkpointing,
        chat_template=settings.chat_template,
    )


def build_strategy(
    method: str, settings: RunSettings, ingredients: Ingredients, **shared: Any
) -> Any:
    """Builds the strategy of a method on a copy of the backbone.

    :param method: name of the method.
    :param settings: the settings of all methods.
    :param ingredients: the stream and the backbone.
    :param shared: ``device``, ``plugins`` and ``evaluator``.
    :raises ValueError: if the settings do not fit the method or the backbone.
    """
    entry = METHODS[method]
    own_settings, options = of_method(method, settings)
    shared["train_mb_size"] = own_settings.batch_size
    shared["train_epochs"] = 1  # set before each stage, see Schedule
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
    """Builds each method once, so that wrong arguments raise before any training.

    :param methods: names of the methods.
    :param settings: the settings.
    :param ingredients: the stream and the backbone.
    :raises ValueError: if the settings do not fit a method or the backbone.
    """
    device = torch.device("cpu")
    for method in methods:
        evaluator = EvaluationPlugin(loggers=[])
        try:
            build_strategy(
                method, settings, ingredients, device=device, plugins=[], evaluator=evaluator
            )
        except RegistrationError:
            continue  # a faulty package; the method's own run reports it
        except ValueError:
            raise
        except Exception:
            continue  # not caused by an argument


__all__ = ["Ingredients", "build_strategy", "check_arguments", "language_model", "prepare"]

"""Builds the stream, the pretrained backbone and the strategy of a run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from treelora_avalanche.registry.streams import build_stream, check_files
from treelora_avalanche.runs.config import find_device, of_method, weights_dtype
from treelora_avalanche.runs.schedule import Schedule
from treelora_avalanche.state import random_state, set_random_state


@dataclass(frozen=True)
class Ingredients:
    """Stream and pretrained backbone, shared by all methods under one seed.

    >>> Ingredients(0, SplitDigits(5), pretrained_digits_vit(0))

    :param seed: the seed.
    :param benchmark: the stream.
    :param backbone: the backbone, which each strategy copies.
    :param known: fingerprints of their files, by path; filled by the first run that needs them.
    :param perplexities: the backbone's perplexities, filled likewise; see
        :func:`~treelora_avalanche.runs.plain_text.base_perplexity`.
    """

    seed: int
    benchmark: Any
    backbone: nn.Module
    known: dict[Path, str] = field(default_factory=dict)
    perplexities: dict[tuple[str, ...], float] = field(default_factory=dict)


def prepare(seed: int, settings: RunSettings, methods: Sequence[str] = ()) -> Ingredients:
    """Builds the stream and the backbone; the weights are loaded last.

    >>> prepare(0, RunSettings(n_experiences=2), ["TreeLoRA"]).benchmark.n_experiences
    2

    :param seed: seed of the class order, of the backbone's head and, for digits, of its
        pretraining.
    :param settings: the settings.
    :param methods: names of methods whose arguments are checked before the weights are loaded.
    :raises ValueError: if the data or the weights cannot be used, or the settings do not fit a
        method.
    :raises OSError: if data or weights are missing and cannot be downloaded.
    """
    check_files(settings)
    RNGManager.set_random_seeds(seed)
    scenario = SCENARIOS[settings.scenario]
    if scenario.backbone is not None:
        benchmark = build_stream(settings, seed)
        ingredients = Ingredients(seed, benchmark, load_object(scenario.backbone)(seed))
        check_arguments(methods, settings, ingredients)
        return ingredients
    return (_with_language_model if settings.on_language else _with_vit)(seed, settings, methods)


def _with_language_model(seed: int, settings: RunSettings, methods: Sequence[str]) -> Ingredients:
    dtype = weights_dtype(settings, find_device(settings.device))
    unloaded = language_model(settings, dtype, pretrained=False)
    benchmark = build_stream(settings, seed, model=unloaded)
    check_arguments(methods, settings, Ingredients(seed, benchmark, unloaded))
    RNGManager.set_random_seeds(seed)  # a checkpoint may lack weights, which are then drawn
    return Ingredients(seed, benchmark, language_model(settings, dtype))


def _with_vit(seed: int, settings: RunSettings, methods: Sequence[str]) -> Ingredients:
    # The model's head needs the number of classes; the data need the model's preprocessing.
    unweighted: Any = models.create_vit(
        settings.model_name, num_classes=0, img_size=settings.img_size, pretrained=False
    )
    preprocessing = models.image_preprocessing(unweighted)
    benchmark = build_stream(settings, seed, preprocessing=preprocessing)
    if methods:
        before = random_state()
        unweighted.reset_classifier(benchmark.n_classes)
        check_arguments(methods, settings, Ingredients(seed, benchmark, unweighted))
        set_random_state(before)
    backbone = models.create_vit(
        settings.model_name,
        num_classes=benchmark.n_classes,
        checkpoint=settings.checkpoint,
        img_size=settings.img_size,
    )
    return Ingredients(seed, benchmark, backbone)


def language_model(settings: RunSettings, dtype: str, *, pretrained: bool = True) -> nn.Module:
    """Returns the language model.

    :param settings: the settings.
    :param dtype: dtype of the frozen weights.
    :param pretrained: whether its weights are loaded.
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
        pretrained=pretrained,
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

    Random generators are left as they were.

    :param methods: names of the methods.
    :param settings: the settings.
    :param ingredients: the stream and the backbone, which needs no weights.
    :raises ValueError: if the settings do not fit a method, the stream or the backbone.
    """
    device = next(ingredients.backbone.parameters()).device  # meta: without weights
    before = random_state()
    for method in methods:
        try:
            Schedule.plan(METHODS[method], of_method(method, settings)[0], ingredients.benchmark)
            build_strategy(
                method,
                settings,
                ingredients,
                device=device,
                plugins=[],
                evaluator=EvaluationPlugin(loggers=[]),
            )
        except RegistrationError:
            continue  # a faulty package; the method's own run reports it
        except ValueError:
            raise
        except Exception:
            continue  # not caused by an argument, or by the weights that are missing
    set_random_state(before)


__all__ = ["Ingredients", "build_strategy", "check_arguments", "language_model", "prepare"]

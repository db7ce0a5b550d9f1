"""Compares the preprocessing of a stream with that of a timm model's pretraining."""

from __future__ import annotations

import logging
from typing import Any

from peft import PeftModel
from torch import nn

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.models.vision import ImagePreprocessing, image_preprocessing

logger = logging.getLogger(__name__)


def warn_of_other_preprocessing(model: nn.Module, experience: Any) -> None:
    """Warns if images are normalised otherwise than for the pretraining of the model.

    Benchmarks of this library know their preprocessing; others are not looked at.

    :param model: the strategy's model.
    :param experience: the experience to train on.
    """
    stream = getattr(experience, "origin_stream", None)
    given = getattr(getattr(stream, "benchmark", None), "preprocessing", None)
    inner = model.module if isinstance(model, TrainableView) else model
    inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    config = getattr(inner, "pretrained_cfg", None)
    if not isinstance(given, ImagePreprocessing) or not (config and "mean" in config):
        return
    own = image_preprocessing(inner)
    if (given.mean, given.std) != (own.mean, own.std):
        logger.warning(
            "the images are normalised with mean %s and std %s, but %s was pretrained with mean %s "
            "and std %s; make the benchmark with `preprocessing=model`",
            given.mean,
            given.std,
            type(inner).__name__,
            own.mean,
            own.std,
        )

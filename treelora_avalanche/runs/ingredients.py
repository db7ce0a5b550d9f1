"""What a run is made of: device, configuration, stream and backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from avalanche.training.determinism.rng_manager import RNGManager
from torch import nn

from treelora_avalanche import models, scenarios
from treelora_avalanche.registry.methods import method_config
from treelora_avalanche.registry.settings import DIGITS_VIT, RunSettings
from treelora_avalanche.registry.streams import IMAGE_STREAMS, TEXT_STREAMS, _data
from treelora_avalanche.runs.texts import language_model


def find_device(name: str, *, elsewhere: bool = False) -> torch.device:
    """The device of a run.

    :param name: auto, or one of torch's names.
    :param elsewhere: whether the run is made on another machine, whose GPUs are not seen here.
    :raises ValueError: if torch does not know it, or sees none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`--device` is {name!r}, which torch does not know") from error
    if device.type == "cuda" and not elsewhere and not torch.cuda.is_available():
        raise ValueError(f"`--device` is {name!r}, but torch sees no GPU; use cpu")
    return device


def resolve_config(
    method: str, seed: int, settings: RunSettings, *, elsewhere: bool = False
) -> dict[str, Any]:
    """The configuration of a run, with the device and the data folder named.

    :param method: name of the method.
    :param seed: the run's seed.
    :param settings: the settings.
    :param elsewhere: see :func:`find_device`.
    """
    config = method_config(method, seed, settings)
    device = find_device(settings.device, elsewhere=elsewhere)
    config["device"] = str(device)
    if settings.data is not None:
        config["data"] = str(Path(settings.data).expanduser().resolve())
    if settings.on_language:
        config["dtype"] = _dtype(settings, device)
        folder = Path(config["model"]).expanduser()
        if folder.is_dir():  # and not a name on the hub
            config["model"] = str(folder.resolve())
    return config


def _dtype(settings: RunSettings, device: torch.device) -> str:
    return settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")


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
        _data(settings)  # what is missing here is noticed before gigabytes are fetched
        model = language_model(settings, _dtype(settings, find_device(settings.device)))
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


__all__ = ["Ingredients", "find_device", "prepare", "resolve_config"]

"""The configuration of a run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from treelora_avalanche.registry.methods import find_method
from treelora_avalanche.registry.settings import RunSettings


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
        config["dtype"] = weights_dtype(settings, device)
        folder = Path(config["model"]).expanduser()
        if folder.is_dir():  # and not a name on the hub
            config["model"] = str(folder.resolve())
    return config


def weights_dtype(settings: RunSettings, device: torch.device) -> str:
    return settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")


WITHOUT_CONSEQUENCE = frozenset({"download"})


def method_config(method: str, seed: int, settings: RunSettings) -> dict[str, Any]:
    """What the outcome of a run depends on; two runs are the same where this is equal.

    Settings that the method or the scenario does not look at are left out, and defaults that depend
    on them are filled in. The keys are flags of `treelora train`.

    :param method: name of the method.
    :param seed: the run's seed.
    :param settings: everything else.
    """
    entry = find_method(method)
    ignored = entry.ignores | settings.without_meaning | WITHOUT_CONSEQUENCE
    config = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.name not in ignored
    }
    config["model"] = settings.model_name
    for name in ("epochs", "epochs_per_task"):  # one stands in place of the other
        if config.get(name, 0) is None:
            del config[name]
    if config.get("precision") == "fp32":  # so the runs of before there was a choice are the same
        del config["precision"]
    if "n_experiences" in config:
        config["n_experiences"] = settings.number_of_experiences
    if "lr" in config and settings.lr is None:
        on_digits = settings.on_digits and entry.digits_lr is not None
        config["lr"] = entry.digits_lr if on_digits else entry.lr
        if settings.on_language:
            config["lr"] = entry.language_lr
    return {"method": method, "seed": seed, **config}

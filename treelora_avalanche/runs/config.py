"""Configuration of a run: the settings that its result depends on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from treelora_avalanche.choices import check_known
from treelora_avalanche.registry.methods import METHODS
from treelora_avalanche.registry.settings import METHOD_SETTINGS, RunSettings

WITHOUT_CONSEQUENCE = frozenset({"download"})


def find_device(name: str, *, elsewhere: bool = False) -> torch.device:
    """Returns the device of a run.

    :param name: ``auto``, or a device of torch.
    :param elsewhere: whether the run takes place on another machine, whose GPUs are unknown here.
    :raises ValueError: if torch does not know the device, or sees no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"`--device` should be a device of torch, but is {name!r}. Pass cpu, cuda or auto."
        ) from error
    if device.type == "cuda" and not elsewhere and not torch.cuda.is_available():
        raise ValueError(
            f"`--device` should be cpu where torch sees no GPU, but is {name!r}. Pass cpu or auto."
        )
    return device


def weights_dtype(settings: RunSettings, device: torch.device) -> str:
    """Returns the dtype of a language model's frozen weights.

    :param settings: the settings.
    :param device: device of the model.
    """
    return settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")


def of_method(method: str, settings: RunSettings) -> tuple[RunSettings, dict[str, Any]]:
    """Returns the settings of one method, and the options of its strategy.

    :param method: name of the method.
    :param settings: the settings of all methods; ``method_options`` override them per method.
    :raises ValueError: if options are given to an unknown method, or are settings that the method
        does not read.
    """
    given = settings.method_options or {}
    for name in given:
        check_known("method in `--method_options`", name, METHODS)
    entry, own = METHODS[method], given.get(method, {})
    changes = {name: value for name, value in own.items() if name in METHOD_SETTINGS}
    for name in changes:
        if name in entry.ignores or name in settings.without_meaning:
            raise ValueError(
                f"`--method_options` of {method} should be options that it reads, but hold "
                f"`{name}`. Leave it out."
            )
    options = {name: value for name, value in own.items() if name not in changes}
    return settings.with_changes(method_options=None, **changes), options


def resolve_config(
    method: str, seed: int, settings: RunSettings, *, elsewhere: bool = False
) -> dict[str, Any]:
    """Returns the settings that the result of a run depends on: equal configurations, equal runs.

    Settings that the method or the scenario does not read are left out; defaults, the device and
    absolute paths are filled in. The keys are flags of ``treelora train``.

    :param method: name of the method.
    :param seed: the run's seed.
    :param settings: the settings.
    :param elsewhere: see :func:`find_device`.
    """
    entry = METHODS[method]
    settings, options = of_method(method, settings)
    ignored = entry.ignores | settings.without_meaning | WITHOUT_CONSEQUENCE
    config = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.name not in ignored
    }
    # epochs and epochs_per_task exclude each other
    absent = ("epochs", "epochs_per_task", "scenario_options", "method_options", "tune_tasks")
    for name in (*absent, "plain_text"):
        if config.get(name, 0) is None:
            del config[name]
    for name, without in (("merge", "none"), ("dropout", 0.0), ("precision", "fp32")):
        if config.get(name) == without:
            del config[name]
    if not settings.on_language and config.get("limit", 0) is None:
        del config["limit"]
    if "plain_text" in config:
        config["plain_text"] = str(Path(config["plain_text"]).expanduser().resolve())
    if options:
        config["method_options"] = {method: options}
    if "model" in config:
        config["model"] = settings.model_name
    if "n_experiences" in config:
        config["n_experiences"] = settings.number_of_experiences
    if "lr" in config:
        config["lr"] = entry.lr(settings)
    device = find_device(settings.device, elsewhere=elsewhere)
    config["device"] = str(device)
    if settings.data is not None:
        config["data"] = str(Path(settings.data).expanduser().resolve())
    if settings.on_language:
        config["dtype"] = weights_dtype(settings, device)
        folder = Path(config["model"]).expanduser()
        if folder.exists():  # not a name on the hub
            config["model"] = str(folder.resolve())
    return {"method": method, "seed": seed, **config}


__all__ = ["find_device", "of_method", "resolve_config", "weights_dtype"]

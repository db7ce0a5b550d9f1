"""Grids of options: lists of values become settings, one for each combination."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, get_args, get_origin

from treelora_avalanche.registry import METHODS, RunSettings
from treelora_avalanche.registry.settings import METHOD_SETTINGS


def expand_options(settings: RunSettings) -> list[RunSettings]:
    """Returns the settings for each combination of listed values in ``method_options``.

    A list is one value for an option that takes a list, such as DualPrompt's ``expert_layers``.

    >>> settings = RunSettings(method_options={"EWCLoRA": {"ewc_lambda": [1.0, 100.0]}})
    >>> [point.method_options["EWCLoRA"]["ewc_lambda"] for point in expand_options(settings)]
    [1.0, 100.0]

    :param settings: the settings.
    """
    given = settings.method_options or {}
    lists = {
        (method, name): value
        for method, options in given.items()
        for name, value in options.items()
        if isinstance(value, list) and method in METHODS and not _takes_list(method, name)
    }
    points = []
    for values in product(*lists.values()):
        chosen: dict[str, dict[str, Any]] = {method: {**own} for method, own in given.items()}
        for (method, name), value in zip(lists, values, strict=True):
            chosen[method][name] = value
        points.append(settings.with_changes(method_options=chosen or None))
    return points


def _takes_list(method: str, name: str) -> bool:
    if name in METHOD_SETTINGS:
        return name in ("layers", "target_modules")
    option = METHODS[method].own_options().get(name)
    return option is None or _is_sequence(option.annotation)


def _is_sequence(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    if isinstance(kind, type) and issubclass(kind, Sequence):
        return kind is not str
    return annotation is Any or any(map(_is_sequence, get_args(annotation)))


__all__ = ["expand_options"]

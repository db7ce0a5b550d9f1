"""Helpers that many test files share. Imported as ``support``: Avalanche's wheel owns ``tests``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Plugin = TypeVar("Plugin")

FEW_PROJECTIONS = {name: {"n_projections": 20} for name in ("RanPAC", "FrozenRanPAC")}
"""Options of methods whose defaults are too slow for tests."""


def make(strategy_class: Any, model: Any, *, seed: int = 1, **options: Any) -> Any:
    """A strategy for tiny streams, its adapter initialised from a seed."""
    torch.manual_seed(seed)
    defaults = {"train_mb_size": 8, "train_epochs": 2, "evaluator": None}
    return strategy_class(model, **{**defaults, **options})


def train(strategy: Any, benchmark: Any, *experiences: int) -> Any:
    """Trains on experiences by number, by default all, each from a seed of its own."""
    for index in experiences or range(len(benchmark.train_stream)):
        torch.manual_seed(10 + index)
        strategy.train(benchmark.train_stream[index])
    return strategy


def weights(strategy: Any) -> dict[str, Tensor]:
    """A copy of the trained parameters."""
    return {name: p.detach().clone() for name, p in strategy.model.named_parameters()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def plugin_of(strategy: Any, kind: type[Plugin]) -> Plugin:
    """The strategy's plugin of a class."""
    return next(plugin for plugin in strategy.plugins if isinstance(plugin, kind))


def images_of(stream: Iterable[Any]) -> Tensor:
    """All images of a stream, ``(n_samples, channels, height, width)``."""
    return torch.stack([image for e in stream for image, *_ in e.dataset])


def identical(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit, so NaN equals NaN and 0.0 differs from -0.0."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = a.detach().cpu().contiguous().flatten(), b.detach().cpu().contiguous().flatten()
        equal = bits[0].numpy().tobytes() == bits[1].numpy().tobytes()
        return a.dtype == b.dtype and a.shape == b.shape and equal
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    return type(a) is type(b) and a == b

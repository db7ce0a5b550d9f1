"""Shim: let a strategy take its model by position without a warning."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

Strategy = TypeVar("Strategy", bound=type)


def positional_model(cls: Strategy) -> Strategy:
    """Class decorator that lets ``model`` be the first positional argument.

    Avalanche 0.6 wraps every strategy's constructor and warns, twice, of any argument that may be
    given by position. Timm and transformers put the model first, and so do we: the decorator hands
    it on by keyword. It can go when Avalanche no longer warns, which
    ``tests/test_strategies.py::test_avalanche_still_warns_of_positional_arguments`` tells.

    :param cls: a strategy whose constructor takes keywords only, ``model`` among them.
    :return: the same class.
    """
    keyword_only = cls.__init__  # type: ignore[misc]

    @functools.wraps(keyword_only)
    def __init__(self: Any, model: nn.Module, **kwargs: Any) -> None:
        keyword_only(self, model=model, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls

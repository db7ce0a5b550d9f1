"""Shim: let a strategy take its model by position without a warning."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

from treelora_avalanche.adapters import find_host
from treelora_avalanche.models.language import LanguageModel

Strategy = TypeVar("Strategy", bound=type)


def positional_model(cls: Strategy) -> Strategy:
    """Class decorator that lets ``model`` be the first positional argument.

    Avalanche 0.6 wraps every strategy's constructor and warns, twice, of any argument that may be
    given by position. Timm and transformers put the model first, and so do we: the decorator hands
    it on by keyword. It can go when Avalanche no longer warns, which
    ``tests/strategies/test_strategies.py::test_avalanche_still_warns_of_positional_arguments``
    tells.

    :param cls: a strategy whose constructor takes keywords only, ``model`` among them.
    :return: the same class.
    """
    keyword_only = cls.__init__  # type: ignore[misc]

    @functools.wraps(keyword_only)
    def __init__(self: Any, model: nn.Module, **kwargs: Any) -> None:
        keyword_only(self, model=model, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def check_language_model(model: nn.Module, method: str) -> None:
    """Raise an error for a model that does not generate text.

    :param model: what was given to a strategy; it may be inside a view.
    :param method: name of the strategy.
    :raises ValueError: if there is no :class:`~treelora_avalanche.models.LanguageModel` in it.
    """
    if not isinstance(find_host(model), LanguageModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}, and {method} takes language models alone; make "
            "one with `treelora_avalanche.models.create_language_model`, or wrap a causal model "
            "of transformers as `LanguageModel(model, tokenizer)`."
        )

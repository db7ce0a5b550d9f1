"""The check of strategies that are defined for language models alone."""

from __future__ import annotations

from torch import nn

from treelora_avalanche.adapters import find_host
from treelora_avalanche.models.language import LanguageModel


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

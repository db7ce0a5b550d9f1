"""Base of the views around a language model that generate text."""

from __future__ import annotations

from typing import Any

from torch import nn

from treelora_avalanche.models.language import LanguageModel


class GeneratingView(nn.Module):
    """Module around a language model with a ``generate`` of its own.

    Metrics of generated text take it as they take a
    :class:`~treelora_avalanche.models.LanguageModel`::

        view.generate(["2 + 2 ="], max_new_tokens=4)
        view.tokenizer  # that of the model
    """

    module: LanguageModel

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the model."""
        return self.module.tokenizer

"""Perplexity of a run's language model on plain text, before and after the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from treelora_avalanche.adapters import TrainableView, find_host
from treelora_avalanche.metrics.perplexity import encode_passages, n_predicted, perplexity
from treelora_avalanche.models.views.precision import autocast_dtype
from treelora_avalanche.plain_text import read_passages
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs.setup import Ingredients


@dataclass(frozen=True)
class PlainText:
    """Plain text as a model reads it, and how the model is evaluated on it.

    >>> text = PlainText.of(model, settings, torch.device("cpu"))
    >>> text.change(before=20.0, after=21.0)["change"]  # 5 % worse
    0.050000000000000044

    :param file: the text file; None for the text of the package.
    :param windows: token sequences, see
        :func:`~treelora_avalanche.metrics.perplexity.encode_passages`.
    :param batch_size: sequences per batch: that of training, which takes more memory.
    :param precision: precision of the forward pass.
    :param device: where to compute.
    """

    file: str | None
    windows: list[list[int]]
    batch_size: int
    precision: str
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, settings: RunSettings, device: torch.device) -> PlainText:
        """Returns the plain text of a run's settings.

        :param model: the language model, or a view of it.
        :param settings: the settings.
        :param device: where to compute.
        """
        host: Any = find_host(model)
        windows = encode_passages(
            host.tokenizer, read_passages(settings.plain_text), host.max_length
        )
        return cls(
            settings.plain_text, windows, settings.batch_size or 1, settings.precision, device
        )

    def of_base(self, base: nn.Module) -> float:
        """Returns the perplexity of the model without adapters, which is then as it was before.

        :param base: the language model.
        """
        view = TrainableView(base)
        view.autocast = autocast_dtype(self.precision, self.device)
        before = next(base.parameters()).device
        training = [module for module in base.modules() if module.training]
        try:
            return self.of_model(view.to(self.device))
        finally:
            base.to(before).eval()
            for module in training:
                module.training = True

    def of_model(self, model: nn.Module) -> float:
        """Returns the perplexity of a strategy's model; a view routes each window.

        :param model: the model, on the device.
        """
        return perplexity(model, self.windows, self.batch_size)

    def change(self, before: float, after: float) -> dict[str, Any]:
        """Returns both perplexities and the relative change, ``after / before - 1``.

        :param before: perplexity of the base model.
        :param after: perplexity of the final model; a positive change is worse.
        """
        return {
            "tokens": n_predicted(self.windows),
            "perplexity_before": before,
            "perplexity_after": after,
            "change": after / before - 1,
        }


def base_perplexity(text: PlainText, ingredients: Ingredients) -> float:
    """Returns the perplexity of the backbone, measured once for all methods that share it.

    :param text: the plain text.
    :param ingredients: the stream and the backbone.
    """
    key = (str(text.file), str(text.batch_size), text.precision, str(text.device))
    if key not in ingredients.perplexities:
        ingredients.perplexities[key] = text.of_base(ingredients.backbone)
    return ingredients.perplexities[key]


def in_words(measured: dict[str, Any]) -> str:
    """Returns one line on the perplexities.

    >>> in_words({"perplexity_before": 20.0, "perplexity_after": 21.0, "change": 0.05})
    'perplexity on plain text 20.00 before the stream, 21.00 after it (+5.0 %)'

    :param measured: from :meth:`PlainText.change`.
    """
    return (
        f"perplexity on plain text {measured['perplexity_before']:.2f} before the stream, "
        f"{measured['perplexity_after']:.2f} after it ({100 * measured['change']:+.1f} %)"
    )


__all__ = ["PlainText", "base_perplexity", "in_words"]

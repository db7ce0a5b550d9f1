"""Encoders of text with a linear classifier: the way of images, with rows of tokens for pixels."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from treelora_avalanche.defaults import ENCODER_LORA
from treelora_avalanche.models.hub import from_folder_or_hub
from treelora_avalanche.models.tokens import PADDING, crop


class TextEncoder(nn.Module):
    """A transformer over rows of tokens, and a linear head on the mean of its outputs.

    The class logits of a row do not depend on its padding, or on the other rows. LoRA and every
    strategy for images take it as they take vision transformers: the head is trained beside the
    adapter, and :func:`~treelora_avalanche.adapters.find_classifier` finds it.

    :param encoder: a model of transformers that gives ``last_hidden_state``, such as
        ``AutoModel.from_pretrained`` gives for BERT, RoBERTa, DeBERTa, or a causal model.
    :param tokenizer: its tokenizer.
    :param num_classes: classes over all tasks.
    :param max_length: most tokens of a text; at most the context of the encoder, to which it is
        lowered.
    :raises ValueError: if an argument is out of range.
    """

    lora_defaults = ENCODER_LORA

    def __init__(
        self, encoder: nn.Module, tokenizer: Any, *, num_classes: int, max_length: int = 256
    ):
        super().__init__()
        if num_classes < 1 or max_length < 1:
            raise ValueError(
                f"`num_classes` is {num_classes} and `max_length` {max_length}; both must be at "
                "least 1."
            )
        config: Any = encoder.config
        context = getattr(config, "max_position_embeddings", None) or max_length
        if getattr(config, "model_type", "") in _OFFSET_POSITIONS:
            context -= 2  # their positions begin after the padding's
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_length = min(max_length, context)
        self.head = nn.Linear(config.hidden_size, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class logits.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        :return: ``(batch, num_classes)``.
        """
        tokens = crop(tokens)
        real = tokens != PADDING
        output = self.encoder(input_ids=tokens.clamp(min=0), attention_mask=real.long())
        hidden: Tensor = output.last_hidden_state * real[:, :, None]
        mean = hidden.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = self.head(mean.to(self.head.weight.dtype))
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEncoder:
        memo[id(self.tokenizer)] = self.tokenizer  # large, and never changed
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """Texts as the rows that a :class:`TextEncoder` takes; what is too long loses its end.

    :param tokenizer: the encoder's tokenizer.
    :param texts: the texts.
    :param max_length: width of the rows.
    :return: ``(n_texts, max_length)``, padded with -1.
    """
    rows = torch.full((len(texts), max_length), PADDING)
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    for row, tokens in zip(rows, encoded, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return rows


def create_text_encoder(
    name_or_folder: str | os.PathLike[str],
    num_classes: int,
    *,
    dtype: torch.dtype | str | None = None,
    max_length: int = 256,
) -> TextEncoder:
    """A pretrained encoder with a new linear head, from a folder or from the hub.

    Only safetensors are read, and no code that comes with a model is ever run.

    :param name_or_folder: see :func:`~treelora_avalanche.models.create_language_model`.
    :param num_classes: classes over all tasks.
    :param dtype: precision of the frozen weights; by default that of the checkpoint.
    :param max_length: see :class:`TextEncoder`.
    :raises FileNotFoundError: if the folder lacks something, such as weights in safetensors.
    :raises OSError: if the hub cannot be reached, or does not have the model.
    """
    with from_folder_or_hub(name_or_folder) as (name, safe):
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        encoder = AutoModel.from_pretrained(
            name, dtype=dtype or "auto", use_safetensors=True, **safe
        )
    return TextEncoder(encoder, tokenizer, num_classes=num_classes, max_length=max_length)

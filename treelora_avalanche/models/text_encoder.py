"""Text encoders with a linear classifier, trained like image models, on token sequences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from treelora_avalanche.adapters.trainable_view import deepcopy_sharing
from treelora_avalanche.defaults import ENCODER_LORA
from treelora_avalanche.models.hub import from_folder_or_hub
from treelora_avalanche.models.tokenization import names_special_token
from treelora_avalanche.models.tokens import PADDING, crop, pad_tokens


class TextEncoder(nn.Module):
    """Transformer over token sequences, with a linear head on the mean of its outputs.

    The logits of a text depend neither on its padding nor on the other texts of the batch. LoRA and
    every strategy for images take it as they take vision transformers: the head is trained with the
    adapter, and :func:`~treelora_avalanche.adapters.find_classifier` finds it::

        model = create_text_encoder("FacebookAI/roberta-base", num_classes=4)
        tokens = encode_texts(model.tokenizer, ["a text"], model.max_length)
        logits = model(tokens)  # (1, 4)

    :param encoder: a model of transformers that gives ``last_hidden_state``, such as
        ``AutoModel.from_pretrained`` gives for BERT, RoBERTa, DeBERTa, or a causal model.
    :param tokenizer: its tokenizer.
    :param num_classes: classes over all tasks.
    :param max_length: most tokens of a text; lowered to the context of the encoder, where that is
        shorter.
    :raises ValueError: if an argument is out of range.
    """

    lora_defaults = ENCODER_LORA

    def __init__(
        self, encoder: nn.Module, tokenizer: Any, *, num_classes: int, max_length: int = 256
    ):
        super().__init__()
        for name, value in (("num_classes", num_classes), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"`{name}` should be at least 1, but is {value}.")
        config: Any = encoder.config
        context = getattr(config, "max_position_embeddings", None) or max_length
        if getattr(config, "model_type", "") in _OFFSET_POSITIONS:
            context -= 2  # their positions begin after the padding's
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_length = min(max_length, context)
        self.head = nn.Linear(config.hidden_size, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the class logits.

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
        return deepcopy_sharing(self, memo, [self.tokenizer])  # large, and never changed


_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """Returns texts as the token sequences that a :class:`TextEncoder` takes.

    Texts that are too long lose their end. Names of special tokens within them stay text.

    :param tokenizer: the encoder's tokenizer.
    :param texts: the texts.
    :param max_length: number of columns.
    :return: ``(n_texts, max_length)``, padded with -1.
    """
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        split_special_tokens=any(names_special_token(tokenizer, text) for text in texts),
    )["input_ids"]
    return pad_tokens(encoded, max_length)


def create_text_encoder(
    name_or_folder: str | os.PathLike[str],
    num_classes: int,
    *,
    dtype: torch.dtype | str | None = None,
    max_length: int = 256,
) -> TextEncoder:
    """Loads a pretrained encoder and gives it a new linear head, from a folder or from the hub.

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

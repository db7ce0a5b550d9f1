"""Perplexity of language models on plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.language import length_batches
from treelora_avalanche.models.token_loss import IGNORED, TokenCrossEntropy
from treelora_avalanche.models.tokenization import names_special_token
from treelora_avalanche.models.tokens import pad_tokens


def encode_passages(tokenizer: Any, passages: Sequence[str], max_length: int) -> list[list[int]]:
    """Returns the token sequences of passages, cut into windows where they are too long.

    There is no chat template; the tokenizer adds its own special tokens, such as one at the
    beginning of a text.

    :param tokenizer: a tokenizer of transformers.
    :param passages: the texts.
    :param max_length: maximal number of tokens that the model reads.
    :raises ValueError: if no passage has two tokens, the second of which is predicted.
    """
    windows = []
    for passage in passages:
        tokens = tokenizer(
            passage, verbose=False, split_special_tokens=names_special_token(tokenizer, passage)
        )["input_ids"]
        # The last token of a window is the first of the next one, so that each is predicted once.
        windows += [
            tokens[start : start + max_length + 1] for start in range(0, len(tokens), max_length)
        ]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError(
            "`--plain_text` should hold passages of at least 2 tokens, but holds none. Choose "
            "another file."
        )
    return windows


def perplexity(model: nn.Module, windows: Sequence[Sequence[int]], batch_size: int = 4) -> float:
    """Returns the perplexity, exp(-(1/n) sum_t log p(x_t | x_<t)). **Lower is better.**

    The model is the one that the strategy predicts with: a view that routes texts routes each
    window by itself, all of which is then its prompt.

    >>> windows = encode_passages(model.tokenizer, ["Once upon a time there was ..."], 512)
    >>> perplexity(strategy.model, windows)

    :param model: model or view of one, from token ids ``(batch, length)`` to logits ``(batch,
        vocabulary, length)``.
    :param windows: token sequences of at least two tokens, see :func:`encode_passages`.
    :param batch_size: sequences per batch.
    """
    device = next(nn.Module.parameters(model)).device
    loss = TokenCrossEntropy(reduction="none")
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(model):
        for batch in length_batches(windows, batch_size):
            tokens = pad_tokens([windows[i][:-1] for i in batch]).to(device)
            targets = pad_tokens([windows[i][1:] for i in batch]).to(device)
            targets = targets.masked_fill(tokens < 0, IGNORED)
            counts = (targets != IGNORED).sum(1)
            total += (loss(model(tokens), targets) * counts).sum()
    return (total / n_predicted(windows)).exp().item()


def n_predicted(windows: Sequence[Sequence[int]]) -> int:
    """Returns the number of predicted tokens.

    :param windows: see :func:`perplexity`.
    """
    return sum(len(window) - 1 for window in windows)


__all__ = ["encode_passages", "n_predicted", "perplexity"]

"""Padded token sequences: padding, cropping, masks and means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PADDING = -1
"""Id of the padding. No token has it, so that no tokenizer needs a padding token, and an end token
is never taken for padding."""


def pad_tokens(sequences: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """Returns token sequences as one tensor, padded on the right.

    >>> pad_tokens([[5, 6, 7], [8]])
    tensor([[ 5,  6,  7],
            [ 8, -1, -1]])

    :param sequences: token ids.
    :param width: number of columns; by default the length of the longest sequence, at least 1.
    :return: ``(n_sequences, width)``.
    """
    if width is None:
        width = max([1, *map(len, sequences)])
    padded = torch.full((len(sequences), width), PADDING)
    for row, tokens in zip(padded, sequences, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return padded


def crop(tokens: Tensor) -> Tensor:
    """Returns token sequences without the columns that are padding in all of them.

    :param tokens: padded on the right, ``(batch, length)``; or hidden states, see
        :func:`real_tokens`.
    :return: a view, at least one column wide.
    """
    longest = int(real_tokens(tokens).sum(1).max()) if len(tokens) else 1
    return tokens[:, : max(1, longest)]


def real_tokens(tokens: Tensor) -> Tensor:
    """Returns the mask that is true at tokens and false at padding, ``(batch, length)``.

    :param tokens: token ids, padded with -1, ``(batch, length)``; or hidden states, padded with
        NaN, ``(batch, length, dim)``.
    """
    return tokens != PADDING if tokens.ndim == 2 else ~tokens[..., 0].isnan()


def first_tokens(mask: Tensor, n: int) -> Tensor:
    """Returns the mask of the first tokens of every sequence, whichever side is padded.

    :param mask: 1 at tokens, 0 at padding, ``(batch, length)``.
    :param n: number of tokens.
    :return: true at the first ``n`` tokens of each sequence, ``(batch, length)``.
    """
    return (mask.cumsum(1) <= n) & (mask > 0)


def mean_over(hidden: Tensor, chosen: Tensor) -> Tensor:
    """Returns the mean over the chosen positions of every sequence, in float32; 0 without any.

    :param hidden: ``(batch, length, dim)``.
    :param chosen: boolean, ``(batch, length)``.
    :return: ``(batch, dim)``.
    """
    # Masked by filling: a factor of 0 would keep NaN.
    total = hidden.float().masked_fill(~chosen[:, :, None], 0).sum(1)
    return total / chosen.sum(1, keepdim=True).clamp(min=1)

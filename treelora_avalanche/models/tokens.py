"""Padded token sequences."""

from __future__ import annotations

from torch import Tensor

PADDING = -1
"""What fills the rows of tokens. No token's id, so that no tokenizer needs a padding token, and an
end token is never taken for padding."""


def crop(tokens: Tensor) -> Tensor:
    """Rows of tokens without the columns that are padding in all of them.

    :param tokens: padded on the right, ``(batch, length)``; or what a prefix has made of them, see
        :func:`real_tokens`.
    :return: a view, at least one column wide.
    """
    longest = int(real_tokens(tokens).sum(1).max()) if len(tokens) else 1
    return tokens[:, : max(1, longest)]


def real_tokens(tokens: Tensor) -> Tensor:
    """Where there is a token, and no padding: ``(batch, length)``.

    :param tokens: token ids, padded with -1, ``(batch, length)``; or hidden states, padded with
        NaN, ``(batch, length, dim)``.
    """
    return tokens != PADDING if tokens.ndim == 2 else ~tokens[..., 0].isnan()


def first_tokens(mask: Tensor, n: int) -> Tensor:
    """Where the first tokens of every row are, whichever side is padded.

    :param mask: 1 at tokens, 0 at padding, ``(batch, length)``.
    :param n: how many tokens of a row are wanted.
    :return: true at the first ``n`` tokens of each row, ``(batch, length)``.
    """
    return (mask.cumsum(1) <= n) & (mask > 0)


def mean_over(hidden: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen positions of every row, in float32; 0 where a row has none.

    :param hidden: ``(batch, length, dim)``.
    :param chosen: boolean, ``(batch, length)``.
    :return: ``(batch, dim)``.
    """
    # Left out by choosing, not by a factor of 0, which would keep what is not a number.
    total = hidden.float().masked_fill(~chosen[:, :, None], 0).sum(1)
    return total / chosen.sum(1, keepdim=True).clamp(min=1)

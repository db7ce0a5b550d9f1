"""Cross entropy over the tokens of the answer, without a float32 copy of all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Target of positions that are not in the loss: the prompt, and the padding."""

_CHUNK_VALUES = 1 << 24
"""Number of logits that are in float32 at a time: 64 MiB."""


class TokenCrossEntropy(nn.Module):
    """Cross entropy of next-token logits, over the positions whose target is not -100.

    The logits stay in their own precision: a few columns at a time are cast to float32, and once
    more in the backward pass, so that the peak memory is that of the logits and of their gradient.
    (``torch.nn.functional.cross_entropy`` on float32 logits keeps three such copies.) Nothing in it
    synchronises with an accelerator.

    Logits and targets may differ in width. Where targets are wider, the model has cropped its input
    to the longest sequence, and the rest is padding. Where logits are wider, the targets are those
    of the last columns, which hold all answers of the batch; see :func:`collate_tokens`::

        loss = TokenCrossEntropy()(model(tokens), targets)

    :param reduction: ``"mean"`` over all answer tokens of the batch; ``"none"`` for the mean over
        each sample's own answer tokens, ``(batch,)``.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        if reduction not in ("mean", "none"):
            raise ValueError(f"`reduction` should be 'mean' or 'none', but is {reduction!r}.")
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss.

        :param logits: ``(batch, vocabulary, length)``.
        :param targets: token ids, -100 where there is no loss, ``(batch, length)``.
        :return: a scalar, or ``(batch,)``; float32, or float64 for such logits.
        """
        width = logits.shape[2]
        targets = targets[:, :width]
        losses: Tensor = _TokenLosses.apply(logits[:, :, width - targets.shape[1] :], targets)
        counts = targets != IGNORED
        if self.reduction == "none":
            return losses.sum(1) / counts.sum(1).clamp(min=1)
        return losses.sum() / counts.sum().clamp(min=1)


class _TokenLosses(torch.autograd.Function):
    """Negative log likelihood of every target, ``(batch, length)``; 0 where it is -100."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, normalizers = [], []
        for columns in _chunks(logits):
            part = _raised(logits[:, :, columns])
            target = targets[:, columns]
            normalizer = part.logsumexp(1)  # (batch, columns)
            chosen = part.gather(1, target.clamp(min=0)[:, None])[:, 0]
            losses.append((normalizer - chosen).masked_fill(target == IGNORED, 0))
            normalizers.append(normalizer)
        ctx.save_for_backward(logits, targets, torch.cat(normalizers, 1))
        return torch.cat(losses, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        weights = gradients[0].masked_fill(targets == IGNORED, 0)  # (batch, length)
        result = torch.empty_like(logits)
        for columns in _chunks(logits):
            # d loss / d logits = softmax - one-hot
            part = _raised(logits[:, :, columns]).sub(normalizers[:, None, columns]).exp_()
            target = targets[:, columns].clamp(min=0)[:, None]
            part.scatter_add_(1, target, torch.full_like(target, -1, dtype=part.dtype))
            result[:, :, columns] = part.mul_(weights[:, None, columns])
        return result, None


def _raised(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(logits: Tensor) -> Iterator[slice]:
    batch, vocabulary, length = logits.shape
    n_columns = max(1, _CHUNK_VALUES // max(1, batch * vocabulary))
    for start in range(0, max(1, length), n_columns):
        yield slice(start, start + n_columns)

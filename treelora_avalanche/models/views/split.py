"""Base of the views that split a model into its frozen blocks and the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.adapters.trainable_view import evaluating


class SplitView(TrainableView):
    """Splits a model at the first trainable block: ``f(x) = trained part(frozen part(x))``.

    The output of the frozen blocks for a sample is the same in every epoch. It needs no gradient,
    can be cached (:class:`~treelora_avalanche.plugins.ActivationCachePlugin`), and ``forward``
    takes it in place of the sample::

        hidden = view.frozen_output(x)
        view(hidden)  # = view(x), up to rounding

    :param module: a model with LoRA.
    """

    reads_inputs = False
    """Whether ``forward`` needs the samples themselves in evaluation mode."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.n_settled = 0
        """Number of blocks that stay frozen although they have trainable parameters."""
        self.n_frozen = self.count_frozen()
        """Number of frozen blocks, counted again whenever the mode is set. None if something below
        the blocks is trainable."""

    def train(self, mode: bool = True) -> SplitView:
        """Sets the mode, see :meth:`torch.nn.Module.train`, and counts the frozen blocks again."""
        n_frozen = self.count_frozen()
        self.n_frozen = None if n_frozen is None else max(n_frozen, self.n_settled)
        super().train(mode)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles every block by itself, as which of them run varies.

        The arguments are those of :meth:`torch.nn.Module.compile`.
        """
        for block in self.blocks:
            block.compile(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the forward pass."""
        return self.autocast or self.weight_dtype

    def agrees(self, x: Tensor) -> bool:
        """Returns whether the two parts, one after the other, compute what the whole model does.

        Not so where blocks read more than the hidden states that the block below hands on.

        :param x: a batch, as the model takes it.
        """
        with evaluating(self):
            parts, whole = self.forward_active(self.frozen_output(x)), self.forward_active(x)
        return torch.allclose(parts, whole, rtol=1e-3, atol=1e-3)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, from the input side to the output side."""
        raise NotImplementedError

    @property
    def weight_dtype(self) -> torch.dtype:
        """Precision of the weights, and of the residual stream."""
        raise NotImplementedError

    def count_frozen(self) -> int | None:
        """Returns the number of blocks below the lowest one with a trainable parameter.

        :return: None where something below the blocks is trainable.
        """
        raise NotImplementedError

    def frozen_output(self, x: Tensor) -> Tensor:
        """Returns the output of the frozen blocks, ``(batch, n_tokens, dim)``.

        :param x: a batch, as the model takes it.
        """
        raise NotImplementedError

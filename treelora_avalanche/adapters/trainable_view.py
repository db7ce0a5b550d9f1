"""A view of a model that shows its trainable parameters alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


class TrainableView(nn.Module):
    """A model seen through its trainable parameters alone.

    ``parameters()`` and ``named_parameters()`` yield only what requires a gradient, and a deep copy
    shares the frozen tensors and buffers. So strategies that keep something per parameter (EWC, SI,
    GEM) or copy the model (LwF) cost the size of the adapter and not that of the backbone.

    :param module: the model, usually a :class:`peft.PeftModel`.
    """

    autocast: torch.dtype | None = None
    """Precision of the forward pass; None is that of the weights."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.live(*args, **kwargs)

    def live(self, *args: Any, **kwargs: Any) -> Any:
        """The answer of the live adapter; a view may have others, and choose among them."""
        with self.autocasting():
            return self.full_precision(self.module(*args, **kwargs))

    def full_precision(self, answer: Any) -> Any:
        """Logits of classes and features in full precision; logits of texts as they are.

        :param answer: ``(batch, n_values)``, or of texts ``(batch, length, n_values)``.
        """
        of_samples = self.autocast is not None and answer.ndim == 2
        return answer.float() if of_samples else answer

    def autocasting(self) -> AbstractContextManager[Any]:
        """A context in which the model computes in the precision of :attr:`autocast`."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(next(self.module.parameters()).device.type, self.autocast)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of what is trained; see :meth:`torch.nn.Module.named_parameters`."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if parameter.requires_grad:
                yield name, parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableView:
        shared = [p for p in self.module.parameters() if not p.requires_grad]
        memo.update((id(tensor), tensor) for tensor in (*shared, *self.module.buffers()))
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.__dict__["_compiled_call_impl"] = None  # it would run this module, not the twin
        return twin


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

"""View of a model that shows only its trainable parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from treelora_avalanche.adapters.first_pass import check_at_first_pass

Module = TypeVar("Module", bound=nn.Module)

HALF = (torch.bfloat16, torch.float16)
"""The dtypes of half precision."""


class TrainableView(nn.Module):
    """Model that shows only its trainable parameters.

    ``parameters()`` and ``named_parameters()`` yield those with ``requires_grad`` alone, and a deep
    copy shares the frozen tensors and buffers. So strategies that store something per parameter
    (EWC, SI, GEM) or copy the model (LwF) need the memory of the adapter, not of the backbone. The
    first training pass raises an error if a gradient does not reach every adapter::

        view = TrainableView(add_lora(vit))
        optimizer = torch.optim.SGD(view.parameters(), lr=0.1)

    :param module: the model, usually a :class:`peft.PeftModel`.
    """

    autocast: torch.dtype | None = None
    """Precision of the forward pass; None is that of the weights."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        check_at_first_pass(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_active(*args, **kwargs)

    def forward_active(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output under the active adapter; ``forward`` of a view may select others."""
        with self.autocasting():
            return self.full_precision(self.module(*args, **kwargs))

    def full_precision(self, output: Any) -> Any:
        """Returns class logits and features in full precision; logits of tokens unchanged.

        :param output: ``(batch, n_values)``, or of tokens ``(batch, n_values, length)``.
        """
        of_samples = isinstance(output, torch.Tensor) and output.ndim == 2
        return at_least_float32(output) if of_samples else output

    def autocasting(self) -> AbstractContextManager[Any]:
        """Returns a context in which the model computes in the precision of :attr:`autocast`."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(next(self.module.parameters()).device.type, self.autocast)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the trainable parameters, see :meth:`torch.nn.Module.named_parameters`."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if parameter.requires_grad:
                yield name, parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableView:
        frozen = [p for p in self.module.parameters() if not p.requires_grad]
        return deepcopy_sharing(self, memo, [*frozen, *self.module.buffers()])


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of half precision in float32, and another one as it is.

    >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
    torch.float32

    :param x: any tensor.
    """
    return x.float() if x.dtype in HALF else x


def active_forward(model: nn.Module) -> Callable[..., Any]:
    """Returns the forward pass of a model under its active adapter, which no view reroutes.

    :param model: any model, or a view of one.
    """
    return model.forward_active if isinstance(model, TrainableView) else model


def deepcopy_sharing(module: Module, memo: dict[int, Any], shared: Iterable[Any]) -> Module:
    """Returns a deep copy of a module that shares some objects with it; for ``__deepcopy__``.

    :param module: the module.
    :param memo: argument of ``__deepcopy__``.
    :param shared: objects that are not copied.
    """
    memo.update((id(thing), thing) for thing in shared)
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    twin.__dict__.update(copy.deepcopy(module.__dict__, memo))
    twin.__dict__["_compiled_call_impl"] = None  # it would run this module, not the twin
    return twin


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode without gradients inside the context, and then the former mode.

    :param model: any model.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

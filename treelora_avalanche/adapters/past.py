"""Frozen adapters of past tasks that are added to the active one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.adapters.attach import lora_layers
from treelora_avalanche.adapters.factors import LoRAFactors, active_factors, check_linear
from treelora_avalanche.state import check_keys


class PastAdapters:
    """Adapters of finished tasks, which are added to the output while a new one is trained.

    A layer computes ``W x + s sum_i B_i A_i x + s B A x``, s being LoRA's scaling: the frozen
    weight, the past adapters, the active one. The past factors are stacked along the rank, so that
    all of them are one product. They are buffers of peft's layer, not part of its ``state_dict``,
    so that pretrained weights, parameters and optimizer do not contain them. Once the stack has as
    many values as the weight, the product sum_i B_i A_i is stored too, and the past costs no more
    than one product with a matrix of the weight's size, however many tasks::

        past = PastAdapters(model)
        past.fold()  # after a task: the active adapter becomes a past one

    Stores ``rank * (n_in + n_out)`` values per layer and task, as many as the adapter has.
    :func:`~treelora_avalanche.adapters.save_adapter` writes active and past adapters as one.

    :param model: a model that carries LoRA; without it, call :meth:`attach` first.
    """

    def __init__(self, model: nn.Module | None = None):
        # Any: to mypy, peft's LoraLayer is no module.
        self._layers: list[Any] = []
        if model is not None:
            self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Adds the past adapters to a model's layers. Those that the layers already have are kept.

        :param model: a model that carries LoRA.
        :raises ValueError: if it carries none, or LoRA on other layers than linear ones.
        """
        check_linear(model, "adding the adapters of past tasks")
        shapes = LoRAFactors(model).shapes  # raises where there is no LoRA
        self._layers = list(lora_layers(model).values())
        for layer, shape in zip(self._layers, shapes, strict=True):
            if not hasattr(layer, "past_A"):
                like = active_factors(layer)[0].detach()
                layer.register_buffer("past_A", like.new_empty(0, shape.n_in), persistent=False)
                layer.register_buffer("past_B", like.new_empty(shape.n_out, 0), persistent=False)
                layer.register_buffer("past_product", None, persistent=False)
                layer.register_forward_hook(self._forward_hook())

    def _forward_hook(self) -> Callable[[Any, tuple[Any, ...], Tensor], Tensor]:
        """Returns a function, so that a deep copy of the model has its own past."""
        return _add_past

    def __len__(self) -> int:
        """Returns the number of past adapters."""
        if not self._layers:
            return 0
        first = self._layers[0]
        return len(first.past_A) // len(active_factors(first)[0])

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """All past A ``(n * rank, n_in)`` and B ``(n_out, n * rank)`` of every layer."""
        return [past_factors(layer) for layer in self._layers]

    @torch.no_grad()
    def fold(self) -> None:
        """Makes the active adapter a past one, and starts a new one: A random, B zero.

        The output of the model stays the same.
        """
        for layer in self._layers:
            a, b = active_factors(layer)
            past_a, past_b = past_factors(layer)
            _set_past(layer, torch.cat((past_a, a)), torch.cat((past_b, b), 1))
            layer.reset_lora_parameters(layer.active_adapters[0], True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the past factors of every layer, not copied."""
        return {"A": [a for a, _ in self.factors], "B": [b for _, b in self.factors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the past adapters by those of a state.

        :param state: return value of :meth:`state_dict`.
        :raises ValueError: if it is of other layers; the past is then unchanged.
        """
        check_keys(state, {"A", "B"}, "the state of PastAdapters")
        if not len(state["A"]) == len(state["B"]) == len(self._layers):
            raise ValueError(
                f"the past adapters in the state should be of {len(self._layers)} layers, but are "
                f"of {len(state['A'])}. Build the strategy with the same layers and target_modules."
            )
        for layer, a, b in zip(self._layers, state["A"], state["B"], strict=True):
            active_a, active_b = active_factors(layer)
            rank, n_in = active_a.shape
            if (*a.shape[1:], *b.shape[:1]) != (n_in, len(active_b)) or (
                len(a) != b.shape[1] or len(a) % rank
            ):
                raise ValueError(
                    f"the past factors in the state should fit {tuple(active_a.shape)} and "
                    f"{tuple(active_b.shape)}, but are {tuple(a.shape)} and {tuple(b.shape)}. "
                    "Build the strategy with the same rank, layers and target_modules."
                )
        for layer, a, b in zip(self._layers, state["A"], state["B"], strict=True):
            like = active_factors(layer)[0]
            _set_past(layer, a.detach().to(like, copy=True), b.detach().to(like, copy=True))


def past_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns all past A ``(n * rank, n_in)`` and B ``(n_out, n * rank)`` of a layer.

    :param layer: a LoRA layer; without :class:`PastAdapters`, n is 0.
    """
    if not hasattr(layer, "past_A"):
        a, b = active_factors(layer)
        return a.detach()[:0], b.detach()[:, :0]
    return layer.past_A, layer.past_B


def _set_past(layer: Any, a: Tensor, b: Tensor) -> None:
    layer.past_A, layer.past_B = a, b
    rows, n_in = a.shape
    thin = rows * (n_in + len(b)) <= n_in * len(b)
    layer.past_product = None if thin else b @ a


def _add_past(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a layer."""
    if layer.disable_adapters or not len(layer.past_A):
        return output
    x = inputs[0].to(layer.past_A.dtype)
    if layer.past_product is None:
        past = F.linear(F.linear(x, layer.past_A), layer.past_B)
    else:
        past = F.linear(x, layer.past_product)
    scaling: float = layer.scaling[layer.active_adapters[0]]
    return (output + scaling * past).to(output.dtype)

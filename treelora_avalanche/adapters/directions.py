"""Frozen directions of past tasks' adapters, with trainable magnitudes, as in SD-LoRA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.adapters.factors import active_factors
from treelora_avalanche.adapters.past import PastAdapters, past_factors
from treelora_avalanche.state import check_keys

START = 0.8
"""Magnitude at which a new direction starts, as in SD-LoRA's released code."""


class PastDirections(PastAdapters):
    """Adapters of finished tasks as unit directions, each with a magnitude per layer.

    With s LoRA's scaling, the layer of task t computes
    ``W x + sum_{k<t} alpha_k B_k A_k x / ||B_k A_k||_F + alpha_t s B_t A_t x``. Past A and B are
    buffers that do not change, B divided by the norm. The magnitudes alpha are a buffer too, and
    parameters from :meth:`train_magnitudes` to :meth:`fix_magnitudes` alone: their number grows,
    and a saved state has the parameters of a new model. Adapters stay out of the weights while text
    is generated::

        past = PastDirections(model)
        past.train_magnitudes()  # an experience begins
        past.fix_magnitudes()  # it ends
        past.fold()  # the active adapter becomes a direction

    Stores ``rank * (n_in + n_out)`` values per layer and past task, and a magnitude per layer and
    task.

    :param model: a model that carries LoRA; without it, call :meth:`attach` first.
    """

    def attach(self, model: nn.Module) -> None:
        """Adds the past directions to a model's layers. Those that they already have are kept.

        :param model: a model that carries LoRA.
        :raises ValueError: if it carries none, or LoRA on other layers than linear ones.
        """
        super().attach(model)
        for layer in self._layers:
            if not hasattr(layer, "magnitudes"):
                start = active_factors(layer)[1].detach().new_full((1,), START)
                layer.register_buffer("magnitudes", start, persistent=False)
                outer = layer.lora_B[layer.active_adapters[0]]
                outer.register_forward_hook(partial(_scale_active, layer))

    def _forward_hook(self) -> Callable[[Any, tuple[Any, ...], Tensor], Tensor]:
        return _add_directions

    @property
    def magnitudes(self) -> list[Tensor]:
        """Magnitudes of every layer, of the past directions and of the active one, ``(n + 1,)``."""
        return [layer.magnitudes for layer in self._layers]

    @torch.no_grad()
    def fold(self) -> None:
        """Makes the active adapter a direction, and starts a new one: A random, B zero.

        Its magnitude becomes ``alpha_t s ||B A||_F``, so that the output of the model stays the
        same.
        """
        for layer in self._layers:
            a, b = active_factors(layer)
            past_a, past_b = past_factors(layer)
            norm = torch.linalg.matrix_norm(b @ a).clamp(min=torch.finfo(b.dtype).tiny)
            layer.past_A, layer.past_B = torch.cat((past_a, a)), torch.cat((past_b, b / norm), 1)
            past, active = layer.magnitudes.detach().split((len(layer.magnitudes) - 1, 1))
            kept = active * scaling_of(layer) * norm
            _set_magnitudes(layer, torch.cat((past, kept, torch.full_like(active, START))))
            layer.reset_lora_parameters(layer.active_adapters[0], True)

    def train_magnitudes(self) -> None:
        """Makes the magnitudes parameters of the model."""
        for layer in self._layers:
            magnitudes = layer.magnitudes.detach()
            del layer.magnitudes
            layer.register_parameter("magnitudes", nn.Parameter(magnitudes))

    def fix_magnitudes(self) -> None:
        """Makes the magnitudes buffers, which are not trained."""
        for layer in self._layers:
            _set_magnitudes(layer, layer.magnitudes.detach())

    def state_dict(self) -> dict[str, Any]:
        """Returns the past factors and all magnitudes of every layer, not copied."""
        return {**super().state_dict(), "magnitudes": [m.detach() for m in self.magnitudes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces directions and magnitudes by those of a state.

        :param state: return value of :meth:`state_dict`.
        :raises ValueError: if it is of other layers; nothing has changed then.
        """
        check_keys(state, {"A", "B", "magnitudes"}, "the state of PastDirections")
        expected = [
            len(a) // len(active_factors(layer)[0]) + 1
            for a, layer in zip(state["A"], self._layers, strict=False)
        ]
        if [len(m) for m in state["magnitudes"]][: len(expected)] != expected:
            raise ValueError(
                f"the magnitudes in the state should be {expected} in number, one per task, but "
                f"are {[len(m) for m in state['magnitudes']]}. Load a state that SDLoRA has saved."
            )
        super().load_state_dict({"A": state["A"], "B": state["B"]})
        for layer, magnitudes in zip(self._layers, state["magnitudes"], strict=True):
            layer.past_product = None
            _set_magnitudes(layer, magnitudes.detach().to(layer.past_A, copy=True))


def active_magnitude(layer: Any) -> float:
    """Returns the magnitude of a layer's active adapter; 1 without :class:`PastDirections`.

    :param layer: a LoRA layer.
    """
    return float(layer.magnitudes[-1]) if hasattr(layer, "magnitudes") else 1.0


def weighted_past(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns the past A and B of a layer, so that its output is ``W x + s B A x`` for them.

    :param layer: a LoRA layer, see :func:`~treelora_avalanche.adapters.past.past_factors`.
    """
    a, b = past_factors(layer)
    if hasattr(layer, "magnitudes"):
        b = b * (_of_rows(layer).detach() / scaling_of(layer))
    return a, b


def scaling_of(layer: Any) -> float:
    """Returns LoRA's scaling of a layer's active adapter.

    :param layer: a LoRA layer.
    """
    return float(layer.scaling[layer.active_adapters[0]])


def _set_magnitudes(layer: Any, magnitudes: Tensor) -> None:
    del layer.magnitudes
    layer.register_buffer("magnitudes", magnitudes, persistent=False)


def _of_rows(layer: Any) -> Tensor:
    """Magnitudes of the rows of the past A, ``(n * rank,)``."""
    past: Tensor = layer.magnitudes[:-1]
    return past.repeat_interleave(len(active_factors(layer)[0]))


def _scale_active(layer: Any, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of the factor B."""
    magnitude: Tensor = layer.magnitudes[-1]
    return output * magnitude.to(output.dtype)


def _add_directions(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a layer."""
    if layer.disable_adapters or not len(layer.past_A):
        return output
    x = inputs[0].to(layer.past_A.dtype)
    past = F.linear(F.linear(x, layer.past_A) * _of_rows(layer), layer.past_B)
    return (output + past).to(output.dtype)

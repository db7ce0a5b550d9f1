"""Check of a model's gradients at its first training pass, in any strategy."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

TRACED_SAMPLES = 2
TRACED_TOKENS = 32  # of a text: its memory is then below that of any step of training


def check_at_first_pass(model: Module) -> Module:
    """Returns the model, whose adapters and classifier are checked when its training begins.

    The first forward pass in training mode with gradients enabled runs
    :func:`~treelora_avalanche.adapters.graph.check_gradients` on two samples of its batch, before
    it computes anything itself. Strategies that check by themselves call :func:`skip_check`::

        model = check_at_first_pass(peft_model)
        Naive(model=model, optimizer=optimizer).train(experience)  # raises if no adapter is reached

    :param model: a model, with or without LoRA.
    """
    model.register_forward_pre_hook(_check)
    return model


def skip_check(model: nn.Module) -> None:
    """Removes the check of :func:`check_at_first_pass` from a model and all its parts.

    :param model: any model.
    """
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _check]:
            del hooks[key]


def _check(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    if not (model.training and torch.is_grad_enabled() and inputs):
        return
    # Compiled code may call a hook that has been removed since.
    if _check not in model._forward_pre_hooks.values():
        return
    # That module imports those which register this hook.
    from treelora_avalanche.adapters.graph import check_gradients

    _check_precision(model, inputs)
    of_text = any(hasattr(module, "tokenizer") for module in model.modules())
    n_tokens = TRACED_TOKENS if of_text else None
    check_gradients(model, *(_first_samples(x, n_tokens) for x in inputs))
    skip_check(model)  # not before: a model that was refused is refused again


def _check_precision(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raises an error for images in a precision that the model's first layer does not take."""
    weights = next((p.dtype for p in nn.Module.parameters(model) if p.is_floating_point()), None)
    given = {x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()}
    casts = any(len(module._forward_pre_hooks) > (module is model) for module in model.modules())
    if weights in (torch.bfloat16, torch.float16) and given - {weights} and not casts:
        name = str(weights).removeprefix("torch.")
        raise ValueError(
            f"`model` should take images in float32, but its weights are {name}. Call "
            "treelora_avalanche.models.views.precision.train_in_float32(model) before training, or "
            "convert it with `.float()`."
        )


def _first_samples(x: Any, n_tokens: int | None) -> Any:
    if not isinstance(x, Tensor) or x.ndim == 0:
        return x
    return x[:TRACED_SAMPLES] if x.ndim == 1 else x[:TRACED_SAMPLES, :n_tokens]

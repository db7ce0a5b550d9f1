"""Check, before training, that gradients reach every adapter and the classifier."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters.attach import PROJECTION_SWITCH, lora_layers
from treelora_avalanche.adapters.classifier import find_classifiers
from treelora_avalanche.adapters.trainable_view import TrainableView, active_forward
from treelora_avalanche.state import random_state, set_random_state

logger = logging.getLogger(__name__)

_NAMED = 3  # matrices that an error names; the others are counted


class Trace(NamedTuple):
    """What one forward and backward pass reached.

    :param outside: the adapted layers whose factor B got no gradient, by name.
    :param still: names of those whose factor B got the gradient 0.
    :param last: name of the last module with parameters that ran, which produces the output.
    :param last_module: that module; None if there is none.
    :param of_samples: whether the output is ``(batch, n_values)``, and not one of every token.
    """

    outside: dict[str, Any]
    still: list[str]
    last: str
    last_module: nn.Module | None
    of_samples: bool


def trace(model: nn.Module, *inputs: Any) -> Trace:
    """Runs a forward and a backward pass of a batch, and leaves the model as it was.

    Random generators, gradients, modes and buffers are restored or not touched: the network runs in
    evaluation mode, without dropout and updates of batch statistics, and never compiled::

        trace(model, images).outside  # {} if every adapter is trained

    :param model: a model with LoRA, or a view of one.
    :param inputs: a batch, as the model takes it.
    """
    network = model.module if isinstance(model, TrainableView) else model
    with _untouched(network):
        with _last_module(network) as ran, torch.enable_grad():
            output = active_forward(model)(*inputs)
            total = _total(output)
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call, unused-ignore]
        outside, still = {}, []
        for name, layer in lora_layers(network).items():
            trained = [p for p in _outer_factors(name, layer) if p.requires_grad]
            if any(p.grad is None for p in trained):
                outside[readable(name)] = layer
            elif trained and not any(bool(p.grad.any()) for p in trained if p.grad is not None):
                still.append(readable(name))
    name, module = ran[-1] if ran else ("", None)
    of_samples = isinstance(output, Tensor) and output.ndim == 2
    return Trace(outside, still, readable(name), module, of_samples)


def check_gradients(model: nn.Module, *inputs: Any, of_features: bool | None = None) -> None:
    """Raises an error for an adapter or a classifier that training would not reach.

    A model without LoRA passes::

        check_gradients(model, images[:2])

    :param model: a model, or a view of one.
    :param inputs: a small batch, as the model takes it.
    :param of_features: whether the model returns features, whose last layer may stay frozen; by
        default if it has no classifier.
    :raises ValueError: if an adapted layer gets no gradient, or a classifier is frozen.
    """
    if not lora_layers(model):
        return
    traced = trace(model, *inputs)
    check_adapters(traced, model)
    warn_of_still_adapters(traced, model)
    of_features = not find_classifiers(model) if of_features is None else of_features
    if traced.of_samples and not of_features:  # an output layer over a vocabulary stays frozen
        check_logits(traced, model)


def check_trainable(model: nn.Module) -> None:
    """Raises an error if all adapters are frozen.

    :param model: a model with LoRA.
    :raises ValueError: if no factor B requires a gradient.
    """
    layers = lora_layers(model)
    factors = [p for name, layer in layers.items() for p in _outer_factors(name, layer)]
    if factors and not any(p.requires_grad for p in factors):
        raise ValueError(
            f"`model` should have a trainable adapter, but the LoRA factors of all {len(layers)} "
            "adapted layers are frozen. Load it with load_adapter, or with "
            "PeftModel.from_pretrained(..., is_trainable=True); enable it if it was disabled."
        )


def check_adapters(traced: Trace, model: nn.Module) -> None:
    """Raises an error if an adapter would never be trained.

    :param traced: return value of :func:`trace`.
    :param model: the model with LoRA.
    :raises ValueError: if the factor B of an adapted layer gets no gradient.
    """
    if traced.outside:
        raise ValueError(
            f"`model` should pass a gradient to every adapted layer, but {_listed(traced.outside)} "
            f"(of {len(lora_layers(model))}) get none: their adapters would not be trained. "
            f"{_remedy(model, traced.outside)}"
        )


def warn_of_still_adapters(traced: Trace, model: nn.Module) -> None:
    """Logs a warning if adapters get the gradient 0, unless the classifier is 0 and starts so.

    Such are those in blocks with a frozen scale of 0, as some models have before pretraining.

    :param traced: return value of :func:`trace`.
    :param model: the model with LoRA.
    """
    head = traced.last_module
    network = model.module if isinstance(model, TrainableView) else model
    if traced.still and (
        head is None or all(bool(p.any()) for p in head.parameters() if p.ndim > 1)
    ):
        logger.warning(
            "the gradient of %s is 0 on the first samples: their adapters may stay as they are. %s",
            _listed(traced.still),
            "float16 rounds gradients below 6e-8 to 0: convert the model with .bfloat16()."
            if any(p.dtype == torch.float16 for p in network.parameters())
            else "Is the model pretrained?",
        )


def _listed(names: Collection[str]) -> str:
    some = ", ".join(f"`{name}`" for name in list(names)[:_NAMED])
    return some + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def check_logits(traced: Trace, model: nn.Module) -> None:
    """Raises an error if a module that produces the logits is frozen.

    These are the classifiers that the model has by name, and the last module that ran.

    :param traced: return value of :func:`trace`.
    :param model: the model with LoRA.
    :raises ValueError: if none of a module's parameters is trainable.
    """
    found = find_classifiers(model)
    if traced.last_module is not None:
        found[traced.last] = traced.last_module
    for name, module in found.items():
        if not any(p.requires_grad for p in module.parameters()):
            last = name.split(".")[-1]
            raise ValueError(
                f"`model` should have a trainable classifier, but its logits come from `{name}` "
                f"({type(module).__name__}), which is frozen. Make the model with num_classes "
                "above 0, its last layer called `head`, `classifier`, `score` or `fc`; in a "
                f"LoraConfig of your own, name {last!r} in `modules_to_save`."
            )


def readable(name: str) -> str:
    """Returns the name that a module has in the model that peft adapts.

    >>> readable("base_model.model.head.modules_to_save.default")
    'head'

    :param name: its name in a view or in the peft model.
    """
    return name.rpartition("base_model.model.")[2].partition(".modules_to_save.")[0]


def _outer_factors(name: str, layer: Any) -> list[nn.Parameter]:
    """The active factors B of a layer, unless it is an expert, which runs for some samples only."""
    if "experts" in name.split("."):
        return []
    held = [layer.lora_B[a] for a in layer.active_adapters if a in layer.lora_B]
    # A disabled or empty layer has no active adapter; then those that it holds count.
    held = held or list(layer.lora_B.values())
    return [p for module in held for p in module.parameters()]


def _remedy(model: nn.Module, outside: dict[str, Any]) -> str:
    if any(layer.merged for layer in outside.values()):
        return "They are merged into the weights: call unmerge_adapter() on the PeftModel first."
    if any(layer.disable_adapters for layer in outside.values()):
        return "They are disabled: call enable_adapter_layers() on the PeftModel first."
    if any(hasattr(m, PROJECTION_SWITCH) for m in model.modules()):
        return (
            "The model reads their weights without calling them: set "
            f"`{PROJECTION_SWITCH} = True` on its attention modules."
        )
    return (
        "The model does not call them, or reads only their weights: adapt others by "
        "`target_modules`, such as ('attn.proj', 'fc1', 'fc2')."
    )


def _total(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.sum()
    parts = output.values() if isinstance(output, dict) else output
    totals = [_total(part) for part in parts if isinstance(part, (Tensor, tuple, list, dict))]
    return torch.stack([total.float() for total in totals]).sum()


@contextmanager
def _untouched(network: nn.Module) -> Iterator[None]:
    """Restores random generators, gradients and modes, and switches compilation off."""
    generators = random_state()
    modes = [(module, module.training) for module in network.modules()]
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    network.eval()
    try:
        # A graph compiled for this batch would change those of the batches to come.
        with torch.compiler.set_stance("force_eager") if _is_compiled(network) else nullcontext():
            yield
    finally:
        network.train(modes[0][1])  # some timm models clear caches here
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        set_random_state(generators)


def _is_compiled(network: nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules
        for module in network.modules()
    )


@contextmanager
def _last_module(network: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Yields a list that will hold the last innermost module with parameters that ran."""
    ran: list[tuple[str, nn.Module]] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            ran[:] = [(name, module)]

        return hook

    hooks = [
        module.register_forward_hook(record(name))
        for name, module in network.named_modules()
        if module._parameters and not any(_has_parameters(child) for child in module.children())
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None

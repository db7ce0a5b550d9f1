"""The parts of a strategy's state: collected, checked, applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from treelora_avalanche.checkpoint.avalanche_plugins import has_state, item_state, load_item_state
from treelora_avalanche.checkpoint.avalanche_strategies import (
    check_own_state,
    load_own_state,
    needs_past_experiences,
    own_state,
)
from treelora_avalanche.state import (
    State,
    backbone_fingerprint,
    check_keys,
    check_optimizer_state,
    check_random_state,
    check_same_tensors,
    clone_state,
    load_optimizer_state,
    optimizer_state,
    random_state,
    set_random_state,
)

_SAME = "Build the strategy with the same arguments, plugins and metrics."


def collect(strategy: Any) -> State:
    optimizer = strategy.optimizer
    return {
        "model": {
            "parameters": _trainable(strategy.model),
            "buffers": _buffers(strategy.model),
        },
        "optimizer": {
            "prepared": strategy.optimized_param_id is not None,
            "state": (
                optimizer_state(optimizer, _parameters(strategy.model))
                if isinstance(optimizer, Optimizer)
                else None
            ),
        },
        "plugins": {key: item_state(plugin) for key, plugin in _plugins(strategy).items()},
        "metrics": {key: item_state(metric) for key, metric in _metrics(strategy).items()},
        "own": own_state(strategy),
        "clock": _counters(strategy),
        "random": random_state(),
    }


def check_fits(strategy: Any, state: State, past: Sequence[Any]) -> None:
    """Raises for a state that does not fit, as far as can be told without asking the plugins."""
    name = type(strategy).__name__
    parts = {"strategy", "versions", "backbone", *_PARTS}
    saved = state.get("strategy") if isinstance(state, dict) else None
    if saved is not None and saved != name:
        raise ValueError(
            f"it is a checkpoint of another method: {saved} was saved, and this is {name}. Build "
            f"{saved}, or choose a folder of {name}."
        )
    check_keys(state, parts, "the state")
    own = backbone_fingerprint(strategy.model)
    check_keys(state["backbone"], own, "the backbone's fingerprint")
    for part, what in (("structure", "other layers"), ("values", "other weights")):
        if state["backbone"][part] != own[part]:
            raise ValueError(
                f"it was trained on another backbone, with {what} (fingerprint of the {part} "
                f"{state['backbone'][part][:12]}, here {own[part][:12]}). Build the model from the "
                "same pretrained weights."
            )
    check_keys(state["model"], {"parameters", "buffers"}, "the model's state")
    check_same_tensors(
        state["model"]["parameters"],
        _trainable(strategy.model),
        "the trained parameters",
        "Build the strategy with the same rank, layers, target_modules and number of classes.",
    )
    check_same_tensors(
        state["model"]["buffers"], _buffers(strategy.model), "the model's buffers", _SAME
    )
    check_keys(state["optimizer"], {"prepared", "state"}, "the optimizer's part")
    if isinstance(strategy.optimizer, Optimizer) != (state["optimizer"]["state"] is not None):
        raise ValueError(f"only one of the state and this strategy has an optimizer. {_SAME}")
    if state["optimizer"]["state"] is not None:
        check_optimizer_state(
            strategy.optimizer, state["optimizer"]["state"], _parameters(strategy.model)
        )
    check_keys(state["plugins"], _plugins(strategy), "its list of plugins", _SAME)
    check_keys(state["metrics"], _metrics(strategy), "its list of metrics", _SAME)
    check_own_state(strategy, state["own"])
    check_keys(state["clock"], _counters(strategy), "its list of counters")
    n_trained = state["clock"]["train_exp_counter"]
    if needs_past_experiences(strategy) and len(past) != n_trained:
        raise ValueError(
            f"{name} keeps data of its past experiences, which is not saved; pass the {n_trained} "
            f"that it was trained on as `past` (it has {len(past)})."
        )
    check_random_state(state["random"])


_PARTS = ("model", "optimizer", "plugins", "metrics", "own", "clock", "random")


def apply(strategy: Any, state: State) -> None:
    with torch.no_grad():
        for kind, own in (
            ("parameters", _trainable(strategy.model)),
            ("buffers", _buffers(strategy.model)),
        ):
            for name, tensor in own.items():
                tensor.copy_(state["model"][kind][name])
    for part, objects in (("plugins", _plugins(strategy)), ("metrics", _metrics(strategy))):
        for key, item in objects.items():
            try:
                load_item_state(item, state[part][key], strategy.device)
            except Exception as error:
                raise ValueError(f"{part}, {key}: {error}") from error
    if state["optimizer"]["state"] is not None:
        load_optimizer_state(
            strategy.optimizer, state["optimizer"]["state"], _parameters(strategy.model)
        )
    # Avalanche forgets the optimizer's state at the first experience that a strategy trains on,
    # which it knows by this attribute being None.
    strategy.optimized_param_id = (
        dict(strategy.model.named_parameters()) if state["optimizer"]["prepared"] else None
    )
    load_own_state(strategy, state["own"])
    vars(strategy.clock).update(state["clock"])
    set_random_state(state["random"])


def undo_steps(strategy: Any) -> Iterable[Callable[[], None]]:
    """What brings the strategy back to where it is now; the last is to be called first."""
    before = clone_state(
        {key: value for key, value in collect(strategy).items() if key != "optimizer"}
    )
    optimizer, ids = strategy.optimizer, strategy.optimized_param_id
    groups, values = getattr(optimizer, "param_groups", []), getattr(optimizer, "state", None)
    parameters = [group["params"] for group in groups]

    def restore_optimizer() -> None:
        strategy.optimized_param_id = ids
        for group, params in zip(groups, parameters, strict=True):
            group["params"] = params
        if values is not None:
            optimizer.param_groups, optimizer.state = groups, values

    yield restore_optimizer
    nothing = {"prepared": ids is not None, "state": None}
    yield partial(apply, strategy, {**before, "optimizer": nothing})


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, also where the model shows the trainable ones alone."""
    return dict(nn.Module.named_parameters(model))


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in _parameters(model).items() if p.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint of the model would hold; a frozen batch norm moves its own."""
    persistent = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _counters(strategy: Any) -> dict[str, int]:
    return {name: value for name, value in vars(strategy.clock).items() if type(value) is int}


def _plugins(strategy: Any) -> dict[str, Any]:
    return _keyed(plugin for plugin in strategy.plugins if has_state(plugin))


def _metrics(strategy: Any) -> dict[str, Any]:
    return _keyed(metric for metric in strategy.evaluator.metrics if has_state(metric))


def _keyed(items: Iterable[Any]) -> dict[str, Any]:
    """By class and number: what somebody else's plugins come between does not matter."""
    keyed: dict[str, Any] = {}
    count: dict[str, int] = {}
    for item in items:
        name = type(item).__name__
        keyed[f"{name}.{count.setdefault(name, 0)}"] = item
        count[name] += 1
    return keyed

"""Parts of a strategy's state: collected, checked, applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from treelora_avalanche.checkpoint.avalanche_plugins import (
    has_state,
    item_state,
    load_item_state,
    needed_to_predict,
)
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
    """Returns the parts of a strategy's state; tensors are not copied."""
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
    """Raises for a state that does not fit, as far as known without the plugins."""
    name = type(strategy).__name__
    parts = {"strategy", "versions", "backbone", *_PARTS}
    saved = state.get("strategy") if isinstance(state, dict) else None
    if saved is not None and saved != name:
        raise ValueError(
            f"the strategy should be {saved}, as in the state, but is {name}. Build {saved}, or "
            f"choose a folder of {name}."
        )
    check_keys(state, parts, "the state")
    check_model_fits(strategy, state)
    check_keys(state["optimizer"], {"prepared", "state"}, "the optimizer's part")
    if isinstance(strategy.optimizer, Optimizer) != (state["optimizer"]["state"] is not None):
        raise ValueError(
            f"both the state and the strategy should have an optimizer, but only one does. {_SAME}"
        )
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
            f"`past` should hold the {n_trained} experiences that {name} was trained on, but holds "
            f"{len(past)}. Pass them: their data is not saved."
        )
    check_random_state(state["random"])


def check_model_fits(strategy: Any, state: State) -> None:
    """Raises for a state of another backbone or another adapter."""
    _check_backbone(strategy.model, state["backbone"])
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


def _check_backbone(model: nn.Module, saved: State) -> None:
    own = backbone_fingerprint(model)
    check_keys(saved, own, "the backbone's fingerprint")
    for part, what in (("structure", "other layers"), ("values", "other weights")):
        if saved[part] != own[part]:
            raise ValueError(
                f"the backbone should be that of the state, but has {what} (fingerprint of the "
                f"{part} {own[part][:12]}, in the state {saved[part][:12]}). Build the "
                "model from the same pretrained weights."
            )


_PARTS = ("model", "optimizer", "plugins", "metrics", "own", "clock", "random")


def apply(strategy: Any, state: State) -> None:
    """Loads a state that :func:`check_fits` has accepted."""
    _apply_model(strategy, state)
    _apply_items("plugins", _plugins(strategy), state, strategy.device)
    _apply_items("metrics", _metrics(strategy), state, strategy.device)
    if state["optimizer"]["state"] is not None:
        load_optimizer_state(
            strategy.optimizer, state["optimizer"]["state"], _parameters(strategy.model)
        )
    # Avalanche resets the optimizer at the first experience, which it recognises by this
    # attribute being None.
    strategy.optimized_param_id = (
        dict(strategy.model.named_parameters()) if state["optimizer"]["prepared"] else None
    )
    load_own_state(strategy, state["own"])
    vars(strategy.clock).update(state["clock"])
    set_random_state(state["random"])


def predicting_parts(strategy: Any) -> State:
    """Returns the parts of a strategy's state that predictions depend on; see :func:`collect`."""
    parts = collect(strategy)
    needed = _predicting(strategy)
    return {
        "model": parts["model"],
        "plugins": {key: state for key, state in parts["plugins"].items() if key in needed},
    }


def apply_predicting(strategy: Any, state: State) -> None:
    """Loads a state of :func:`predicting_parts` that :func:`check_model_fits` has accepted."""
    plugins = _predicting(strategy)
    missing = sorted(plugins.keys() - state["plugins"].keys())
    if missing:
        raise ValueError(f"the state should hold {', '.join(missing)}, but does not. {_SAME}")
    _apply_model(strategy, state)
    _apply_items("plugins", plugins, state, strategy.device)


def prepare_loaded(strategy: Any) -> None:
    """Lets plugins prepare the strategy's model from their state, which was loaded."""
    for plugin in strategy.plugins:
        if hasattr(plugin, "prepare_loaded"):
            plugin.prepare_loaded(strategy)


def _predicting(strategy: Any) -> dict[str, Any]:
    return {key: p for key, p in _plugins(strategy).items() if needed_to_predict(p)}


def _apply_model(strategy: Any, state: State) -> None:
    with torch.no_grad():
        for kind, own in (
            ("parameters", _trainable(strategy.model)),
            ("buffers", _buffers(strategy.model)),
        ):
            for name, tensor in own.items():
                tensor.copy_(state["model"][kind][name])


def _apply_items(part: str, objects: dict[str, Any], state: State, device: Any) -> None:
    for key, item in objects.items():
        try:
            load_item_state(item, state[part][key], device)
        except Exception as error:
            raise ValueError(f"{part}, {key}: {error}") from error


def differing_options(strategy: Any, state: State) -> list[str]:
    """Returns the options of the optimizer that the state would change, such as the learning rate.

    :param strategy: the strategy, before it is loaded.
    :param state: the state.
    """
    saved = state["optimizer"]["state"]
    if saved is None:
        return []
    differing = {
        f"{name}={value} and not {own[name]}"
        for group, own in zip(saved["groups"], strategy.optimizer.param_groups, strict=True)
        for name, value in group["options"].items()
        if name in own and own[name] != (tuple(value) if isinstance(value, list) else value)
    }
    return sorted(differing)


def undo_steps(strategy: Any) -> Iterable[Callable[[], None]]:
    """Yields functions that restore the present state; call the last one first."""
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
    """Returns all parameters, also where the model exposes only the trainable ones."""
    return dict(nn.Module.named_parameters(model))


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in _parameters(model).items() if p.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the persistent buffers; those of a frozen batch norm change in training."""
    persistent = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _counters(strategy: Any) -> dict[str, int]:
    return {name: value for name, value in vars(strategy.clock).items() if type(value) is int}


def _plugins(strategy: Any) -> dict[str, Any]:
    return _keyed(plugin for plugin in strategy.plugins if has_state(plugin))


def _metrics(strategy: Any) -> dict[str, Any]:
    return _keyed(metric for metric in strategy.evaluator.metrics if has_state(metric))


def _keyed(items: Iterable[Any]) -> dict[str, Any]:
    """Returns items by class and number, so that other plugins in between do not matter."""
    keyed: dict[str, Any] = {}
    count: dict[str, int] = {}
    for item in items:
        name = type(item).__name__
        keyed[f"{name}.{count.setdefault(name, 0)}"] = item
        count[name] += 1
    return keyed

"""State of plugins and metrics, including some of Avalanche's without a ``state_dict``.

These are the plugins that our strategies are composed of (EWC, GEM), and the metrics that compare
experiences (forgetting, backward and forward transfer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from avalanche.evaluation.metrics.forgetting_bwt import Forgetting
from avalanche.evaluation.metrics.forward_transfer import ForwardTransfer
from avalanche.training.plugins import EWCPlugin, GEMPlugin
from avalanche.training.utils import ParamData
from torch import Tensor

from treelora_avalanche.plugins import SampleFisherEWCPlugin, WithinTaskGEMPlugin
from treelora_avalanche.state import State, check_keys

# Attributes by experience, and the arguments that must be the same; a subclass before its parent.
_KEPT: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    SampleFisherEWCPlugin: (
        ("saved_params", "importances"),
        ("ewc_lambda", "mode", "decay_factor", "n_samples"),
    ),
    EWCPlugin: (("saved_params", "importances"), ("ewc_lambda", "mode", "decay_factor")),
    WithinTaskGEMPlugin: (
        ("memory_x", "memory_y", "memory_tid", "memory_classes"),
        ("patterns_per_experience", "memory_strength"),
    ),
    GEMPlugin: (
        ("memory_x", "memory_y", "memory_tid"),
        ("patterns_per_experience", "memory_strength"),
    ),
}


def has_state(item: Any) -> bool:
    """Returns whether the state of a plugin or metric can be read and written here.

    :param item: a plugin or metric.
    """
    own = hasattr(item, "state_dict") and hasattr(item, "load_state_dict")
    return own or _kept(item) is not None or _compares_experiences(item) is not None


def needed_to_predict(plugin: Any) -> bool:
    """Returns whether predictions depend on the state of a plugin.

    They do not for Avalanche's EWC and GEM, nor for a plugin with ``needed_to_predict = False``.

    :param plugin: a plugin that :func:`has_state`.
    """
    return _kept(plugin) is None and getattr(plugin, "needed_to_predict", True)


def item_state(item: Any) -> State:
    """Returns the state of a plugin or metric that :func:`has_state`; tensors are not copied.

    :param item: a plugin or metric.
    """
    if hasattr(item, "state_dict"):
        return _dictionaries(item.state_dict())
    kept = _kept(item)
    if kept is not None:
        return {
            "settings": {name: getattr(item, name) for name in kept[1]},
            **{
                name: {str(e): _tensors(value) for e, value in getattr(item, name).items()}
                for name in kept[0]
            },
        }
    return {
        "train_exp_id": item.train_exp_id,
        "at_init": getattr(item, "at_init", None),
        "values": {
            name: [[experience, value] for experience, value in values.items()]
            for name, values in vars(_compares_experiences(item)).items()
        },
    }


def load_item_state(item: Any, state: State, device: torch.device | str) -> None:
    """Loads a state into a plugin or metric.

    :param item: a plugin or metric that :func:`has_state`.
    :param state: what :func:`item_state` returned.
    :param device: the device of the strategy.
    :raises ValueError: if the state does not fit; the item is then unchanged.
    """
    if hasattr(item, "load_state_dict"):
        item.load_state_dict(state)
        return
    where = f"the state of {type(item).__name__}"
    kept = _kept(item)
    if kept is None:
        check_keys(state, {"train_exp_id", "at_init", "values"}, where)
        inner = vars(_compares_experiences(item))
        check_keys(state["values"], inner, where)
        values = {name: dict(v) for name, v in state["values"].items()}
        item.train_exp_id = state["train_exp_id"]
        if state["at_init"] is not None:
            item.at_init = state["at_init"]
        inner.update(values)
        return
    check_keys(state, {"settings", *kept[0]}, where)
    check_keys(state["settings"], kept[1], where)
    for name, value in state["settings"].items():
        if value != getattr(item, name):
            raise ValueError(
                f"`{name}` of {type(item).__name__} should be {value!r}, as in the state, but is "
                f"{getattr(item, name)!r}. Build it with {name}={value!r} to continue."
            )
    loaded = {
        name: {int(e): _untensors(value, device) for e, value in state[name].items()}
        for name in kept[0]
    }
    for name, values in loaded.items():
        own = getattr(item, name)  # in place: some are default dictionaries
        own.clear()
        own.update(values)


def _kept(item: Any) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    return next((kept for kind, kept in _KEPT.items() if isinstance(item, kind)), None)


def _compares_experiences(metric: Any) -> Forgetting | ForwardTransfer | None:
    inner = getattr(metric, "forgetting", None) or getattr(metric, "forward_transfer", None)
    return inner if isinstance(inner, (Forgetting, ForwardTransfer)) else None


def _tensors(value: Tensor | Mapping[str, ParamData]) -> Any:
    """Returns the values of one experience: a tensor, or one per parameter."""
    if isinstance(value, Tensor):
        return value
    return {name: parameter.data for name, parameter in value.items()}


def _untensors(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return {
        name: ParamData(name, init_tensor=tensor.to(device, copy=True), device=device)
        for name, tensor in value.items()
    }


def _dictionaries(state: Any) -> Any:
    """Returns a state with plain dictionaries; those of modules are ordered ones."""
    if isinstance(state, Mapping):
        return {key: _dictionaries(value) for key, value in state.items()}
    return state


__all__ = ["has_state", "item_state", "load_item_state"]

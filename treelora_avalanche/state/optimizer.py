"""State of an optimizer, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from treelora_avalanche.state.checks import State, check_keys, clone_state, some_of


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> State:
    """Returns the state of an optimizer, with names of parameters in place of positions.

    :param optimizer: an optimizer with the interface of ``torch.optim``.
    :param parameters: the model's parameters by name.
    """
    named = _named_parameters(optimizer, parameters)
    name_of = {id(parameter): name for name, parameter in named.items()}
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {
                "parameters": [name_of[id(parameter)] for parameter in group["params"]],
                "options": {
                    key: list(value) if isinstance(value, tuple) else value
                    for key, value in group.items()
                    if key != "params"
                },
            }
            for group in optimizer.param_groups
        ],
        "state": {
            name_of[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()
        },
    }


def reset_optimizer_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Deletes the optimizer's state of some parameters, such as moments and momentum.

    :param optimizer: the optimizer.
    :param parameters: parameters that start again from new values.
    """
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def set_parameters(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Replaces the parameters of an optimizer; the state of those that stay is kept.

    :param optimizer: an optimizer with one parameter group, as Avalanche requires.
    :param parameters: the parameters.
    """
    (group,) = optimizer.param_groups
    group["params"] = list(parameters)
    kept = {id(parameter) for parameter in group["params"]}
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]


def check_optimizer_state(
    optimizer: Optimizer, state: State, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Raises an error if a state does not fit an optimizer; changes nothing.

    :param optimizer: the optimizer.
    :param state: what :func:`optimizer_state` returned.
    :param parameters: the model's parameters by name.
    :raises ValueError: if the class, the groups or the parameters differ.
    """
    check_keys(state, {"class", "groups", "state"}, "the optimizer's state")
    if state["class"] != type(optimizer).__name__:
        raise ValueError(
            f"the optimizer should be {state['class']}, as in the state, but is "
            f"{type(optimizer).__name__}. Build the strategy with the same optimizer."
        )
    groups = state["groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the optimizer should have {len(groups)} parameter groups, as in the state, but has "
            f"{len(optimizer.param_groups)}. Build it with the same groups."
        )
    named = _named_parameters(optimizer, parameters)
    name_of = {id(parameter): name for name, parameter in named.items()}
    for index, (saved, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        check_keys(saved, {"parameters", "options"}, f"the optimizer's group {index}")
        # Avalanche adds parameters to a new optimizer, so the state may name more.
        unknown = [name for name in saved["parameters"] if name not in named]
        lost = {name_of[id(p)] for p in own["params"]} - set(saved["parameters"])
        if unknown or lost:
            raise ValueError(
                f"the optimizer's group {index} should have the parameters of the state, but "
                f"differs in {some_of(sorted({*unknown, *lost}))}. Build it with the same groups."
            )
    listed = {name for group in groups for name in group["parameters"]}
    stray = sorted(set(state["state"]) - listed)
    if stray:
        raise ValueError(
            f"the optimizer's state should be of parameters in its groups, but has "
            f"{some_of(stray)}. Use another copy of the state."
        )


def load_optimizer_state(
    optimizer: Optimizer, state: State, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Loads a state into an optimizer; the tensors are copied.

    :param optimizer: the optimizer; its groups get exactly the parameters of the state.
    :param state: what :func:`optimizer_state` returned.
    :param parameters: the model's parameters by name.
    :raises ValueError: if the state does not fit; the optimizer is then unchanged.
    """
    check_optimizer_state(optimizer, state, parameters)
    named = _named_parameters(optimizer, parameters)
    position: dict[str, int] = {}
    groups = []
    for own, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        for name in saved["parameters"]:
            position[name] = len(position)
        options = {
            key: tuple(value) if isinstance(own.get(key), tuple) else value
            for key, value in saved["options"].items()
        }
        groups.append({**options, "params": [position[name] for name in saved["parameters"]]})
        own["params"] = [named[name] for name in saved["parameters"]]
    values = {position[name]: clone_state(value) for name, value in state["state"].items()}
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def _named_parameters(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Returns the model's parameters, and by position the optimizer's other ones."""
    named = dict(parameters)
    known = {id(parameter) for parameter in named.values()}
    for g, group in enumerate(optimizer.param_groups):
        for p, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                named[f"group {g}, parameter {p}"] = parameter
    return named


__all__ = [
    "check_optimizer_state",
    "load_optimizer_state",
    "optimizer_state",
    "reset_optimizer_state",
    "set_parameters",
]

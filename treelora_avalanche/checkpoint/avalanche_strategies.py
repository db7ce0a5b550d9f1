"""State of Avalanche's strategies that keep something outside their plugins.

StreamingLDA has tensors of its own. Replay, LwF and Cumulative keep data of past experiences, or
values computed from it: these are not saved, but rebuilt from the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training import Cumulative, LwF, Replay, StreamingLDA
from avalanche.training.plugins import LwFPlugin, ReplayPlugin
from torch import Tensor

from treelora_avalanche.plugins.training.memory_draws import MemoryDrawsPlugin
from treelora_avalanche.state import State, check_keys, check_same_tensors

# `Lambda` is computed from these when needed.
_STREAMING_LDA = ("muK", "cK", "Sigma", "num_updates")


# --------------------------------------------------------------------------------------------------
# Attributes of a strategy


def own_state(strategy: Any) -> State:
    """Returns the attributes of a strategy that outlive an experience; tensors are not copied.

    :param strategy: an Avalanche strategy.
    """
    if isinstance(strategy, StreamingLDA):
        return {name: getattr(strategy, name) for name in _STREAMING_LDA}
    return {}


def check_own_state(strategy: Any, state: State) -> None:
    """Raises an error if a state does not fit; changes nothing.

    :param strategy: an Avalanche strategy.
    :param state: what :func:`own_state` returned.
    :raises ValueError: if it does not fit.
    """
    where = f"the attributes of {type(strategy).__name__}"
    own = own_state(strategy)
    check_keys(state, own, where)
    found, expected = (
        {name: value for name, value in part.items() if isinstance(own[name], Tensor)}
        for part in (state, own)
    )
    check_same_tensors(found, expected, where, "Use the same number of classes and features.")


def load_own_state(strategy: Any, state: State) -> None:
    """Loads a state into a strategy.

    :param strategy: an Avalanche strategy.
    :param state: what :func:`own_state` returned.
    """
    for name, value in state.items():
        is_tensor = isinstance(value, Tensor)
        setattr(strategy, name, value.to(strategy.device, copy=True) if is_tensor else value)
    if isinstance(strategy, StreamingLDA):
        strategy.prev_num_updates = -1  # `Lambda` must be recomputed


# --------------------------------------------------------------------------------------------------
# Data of past experiences


def needs_past_experiences(strategy: Any) -> bool:
    """Returns whether a strategy needs its past experiences to continue.

    :param strategy: an Avalanche strategy.
    """
    return isinstance(strategy, tuple(_REBUILD))


def can_be_rebuilt(strategy: Any, plugin: Any) -> bool:
    """Returns whether :func:`rebuild_memory` restores the data of a plugin.

    :param strategy: an Avalanche strategy.
    :param plugin: one of its plugins.
    """
    if isinstance(strategy, Replay):
        return isinstance(plugin, ReplayPlugin) and _draws(strategy) is not None
    return isinstance(strategy, LwF) and isinstance(plugin, LwFPlugin)


def rebuild_memory(strategy: Any, past: Sequence[Any]) -> None:
    """Restores the data of past experiences, once the state of the strategy is loaded.

    :param strategy: an Avalanche strategy.
    :param past: the experiences that it was trained on, in order.
    """
    for kind, take in _REBUILD.items():
        if isinstance(strategy, kind):
            take(strategy, past)


def _cumulate(strategy: Cumulative, past: Sequence[Any]) -> None:
    strategy.dataset = None
    for strategy.experience in past:
        strategy.train_dataset_adaptation()
    strategy.experience = None


def _distil(strategy: LwF, past: Sequence[Any]) -> None:
    """Sets the teacher to the model after the last experience: the strategy's plugin comes last.

    The sets of classes are joined in the order of the stream: the loss sums over a set in an order
    that depends on how the set has grown, which affects the last bits.
    """
    lwf = _plugin(strategy, LwFPlugin).lwf
    lwf.expcount = 0
    lwf.prev_model = None
    lwf.prev_classes_by_task.clear()
    strategy.model.train()  # as it is copied at the end of an experience
    for experience in past:
        lwf.post_adapt(strategy, experience)


def _draw(strategy: Replay, past: Sequence[Any]) -> None:
    policy = _plugin(strategy, ReplayPlugin).storage_policy
    policy.buffer_groups.clear()
    policy._num_exps = 0
    draws = _draws(strategy)
    assert draws is not None  # or the state could not have been saved
    with torch.random.fork_rng(devices=()):
        for experience, random_state in zip(past, draws.random_states, strict=True):
            torch.set_rng_state(random_state)
            policy.post_adapt(strategy, experience)


def _draws(strategy: Replay) -> MemoryDrawsPlugin | None:
    return _plugin(strategy, MemoryDrawsPlugin)


def _plugin(strategy: Any, kind: type) -> Any:
    return next((plugin for plugin in strategy.plugins if isinstance(plugin, kind)), None)


_REBUILD: dict[type, Callable[[Any, Sequence[Any]], None]] = {
    Cumulative: _cumulate,
    LwF: _distil,
    Replay: _draw,
}


__all__ = [
    "can_be_rebuilt",
    "check_own_state",
    "load_own_state",
    "needs_past_experiences",
    "own_state",
    "rebuild_memory",
]

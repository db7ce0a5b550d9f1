"""State of Avalanche's strategies that keep something outside of their plugins.

StreamingLDA has tensors of its own. Replay, LwF and Cumulative remember data of past experiences,
or what they have read from it: that is not saved, but taken again from the stream.
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

# What of it changes; `Lambda` is computed from these when it is needed.
_STREAMING_LDA = ("muK", "cK", "Sigma", "num_updates")


# --------------------------------------------------------------------------------------------------
# Tensors of a strategy's own


def own_state(strategy: Any) -> State:
    """What a strategy keeps as attributes; tensors are not copied.

    :param strategy: an Avalanche strategy.
    """
    if isinstance(strategy, StreamingLDA):
        return {name: getattr(strategy, name) for name in _STREAMING_LDA}
    return {}


def check_own_state(strategy: Any, state: State) -> None:
    """Raise an error if a state does not fit; changes nothing.

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
    check_same_tensors(found, expected, where, "Use as many classes and features.")


def load_own_state(strategy: Any, state: State) -> None:
    """Put a strategy into a state.

    :param strategy: an Avalanche strategy.
    :param state: what :func:`own_state` returned.
    """
    for name, value in state.items():
        is_tensor = isinstance(value, Tensor)
        setattr(strategy, name, value.to(strategy.device, copy=True) if is_tensor else value)
    if isinstance(strategy, StreamingLDA):
        strategy.prev_num_updates = -1  # `Lambda` is not that of these tensors


# --------------------------------------------------------------------------------------------------
# Data of past experiences


def needs_past_experiences(strategy: Any) -> bool:
    """Whether a strategy has to see its past experiences again to continue.

    :param strategy: an Avalanche strategy.
    """
    return isinstance(strategy, tuple(_REBUILD))


def can_be_rebuilt(strategy: Any, plugin: Any) -> bool:
    """Whether :func:`rebuild_memory` brings back what a plugin keeps.

    :param strategy: an Avalanche strategy.
    :param plugin: one of its plugins.
    """
    if isinstance(strategy, Replay):
        return isinstance(plugin, ReplayPlugin) and _draws(strategy) is not None
    return isinstance(strategy, LwF) and isinstance(plugin, LwFPlugin)


def rebuild_memory(strategy: Any, past: Sequence[Any]) -> None:
    """Bring back what a strategy keeps of its past, once its state is loaded.

    :param strategy: an Avalanche strategy.
    :param past: the experiences that it was trained on, in this order.
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
    """The teacher is the model as the last experience has left it: the strategy's plugin is last.

    The classes are joined as they came: the loss sums over them in the order of a set, which
    depends on how the set has grown, and with it the last bits.
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

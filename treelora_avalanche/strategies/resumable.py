"""Save a strategy between two experiences, and continue in a new process as if nothing had been."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import Tensor, nn
from torch.optim import Optimizer

from treelora_avalanche.plugins.built_in import has_state, item_state, load_item_state
from treelora_avalanche.provenance import versions
from treelora_avalanche.state import (
    State,
    backbone_fingerprint,
    check_keys,
    check_optimizer_state,
    check_random_state,
    check_same_tensors,
    clone_state,
    load_optimizer_state,
    load_state,
    optimizer_state,
    random_state,
    save_state,
    set_random_state,
)
from treelora_avalanche.strategies.built_in import (
    check_own_state,
    keeps_past,
    load_own_state,
    own_state,
    take_again,
    takes_again,
)

logger = logging.getLogger(__name__)

_SAME = "Build the strategy with the same arguments, plugins and metrics."


def strategy_state(strategy: Any) -> State:
    """Everything of a strategy that outlives an experience; tensors are references, not copies.

    That is: the trained parameters and the buffers of its model, its optimizer's state, the state
    of each of its plugins and metrics, Avalanche's counters, and the global random generators.
    Plugins and metrics are known by their class and by their place among those of that class. Of
    Avalanche's own metrics, those of forgetting and of transfer span experiences, and are kept.

    :param strategy: an Avalanche strategy between two experiences.
    :raises RuntimeError: if an experience is being trained or evaluated, or was interrupted.
    :raises TypeError: if a plugin cannot be saved, see :func:`plugins_without_state`.
    """
    experience = strategy.experience
    if experience is not None:
        raise RuntimeError(
            f"experience {experience.current_experience} is being trained or evaluated, or was "
            "interrupted, and its middle cannot be saved; save when `strategy.train` has returned."
        )
    stateless = plugins_without_state(strategy)
    if stateless:
        raise TypeError(
            f"the plugins {', '.join(stateless)} have no `state_dict` and `load_state_dict`, and "
            "without their state the stream could not be continued as it was; give them both (of "
            "an empty dictionary if there is nothing to keep)."
        )
    return {
        "strategy": type(strategy).__name__,
        "versions": versions(),
        "backbone": backbone_fingerprint(strategy.model),
        **_collect(strategy),
    }


def plugins_without_state(strategy: Any) -> list[str]:
    """Class names of the plugins that keep something and cannot say what.

    A plugin needs ``state_dict()`` and ``load_state_dict(state)``, of tensors and plain values,
    unless it has no attributes at all. Of Avalanche's own, EWC and GEM are known; and those of its
    ``LwF``, and of its ``Replay`` with a :class:`~treelora_avalanche.plugins.MemoryDrawsPlugin`.

    :param strategy: an Avalanche strategy.
    """
    return [
        type(plugin).__name__
        for plugin in strategy.plugins
        if not has_state(plugin)
        and not takes_again(strategy, plugin)
        and not isinstance(plugin, (EvaluationPlugin, PeriodicEval, Clock))
        and vars(plugin)
    ]


def load_strategy_state(strategy: Any, state: State, past: Sequence[Any] = ()) -> None:
    """Put a strategy into a state; experience after experience it then does what that one did.

    :param strategy: a strategy built like the one that was saved, from the same pretrained
        backbone. An experience in which its training was interrupted is given up.
    :param state: what :func:`strategy_state` returned.
    :param past: the experiences that it was trained on, in this order. Avalanche's ``Replay``,
        ``LwF`` and ``Cumulative`` need them, whose memory is data of the stream and is not saved;
        others do not look at them.
    :raises ValueError: if the state does not fit; the strategy is then as it was.
    """
    _check(strategy, state, past)
    with ExitStack() as undo:
        # What a plugin refuses is known only when it is asked, and others were loaded before it.
        for step in _undo_steps(strategy):
            undo.callback(step)
        _apply(strategy, state)
        undo.pop_all()
    strategy.experience = None
    take_again(strategy, past)
    for plugin in strategy.plugins:
        # What a plugin makes of its state with the strategy's model, which it sees only now.
        if hasattr(plugin, "prepare_loaded"):
            plugin.prepare_loaded(strategy)
    changed = [
        f"{name} {saved} (now {versions().get(name)})"
        for name, saved in state["versions"].items()
        if saved != versions().get(name)
    ]
    if changed:
        logger.warning(
            "the state was saved with %s: results may differ in the last bits", ", ".join(changed)
        )


def save_strategy(strategy: Any, folder: str | os.PathLike[str]) -> None:
    """Save any Avalanche strategy whose plugins have state; see :meth:`Resumable.save`.

    :param strategy: an Avalanche strategy between two experiences.
    :param folder: where to.
    """
    save_state(folder, strategy_state(strategy))


def load_strategy(strategy: Any, folder: str | os.PathLike[str], past: Sequence[Any] = ()) -> None:
    """Load what :func:`save_strategy` has written; see :meth:`Resumable.load`.

    :param strategy: a strategy built like the one that was saved.
    :param folder: the folder of the state.
    :param past: see :func:`load_strategy_state`.
    """
    state = load_state(folder)
    try:
        load_strategy_state(strategy, state, past)
    except ValueError as error:
        raise ValueError(f"the state in {folder} cannot be loaded: {error}") from error


class Resumable:
    """Mixin for strategies: save and load at the boundaries of experiences."""

    def state_dict(self) -> State:
        """The state between two experiences, see :func:`strategy_state`."""
        return strategy_state(self)

    def load_state_dict(self, state: State) -> None:
        """Continue from a state, see :func:`load_strategy_state`.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if the state does not fit; the strategy is then as it was.
        """
        load_strategy_state(self, state)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save between two experiences: all tensors in safetensors, all else in JSON.

        The pretrained backbone is not saved, only its fingerprint. The folder is complete at every
        moment: it is replaced when the new state is written.

        Avalanche has ``save_checkpoint`` and ``maybe_load_checkpoint`` (in
        ``avalanche.checkpointing``) for this. **They do not work with today's torch**: Avalanche
        0.6 pickles the whole strategy with dill, which fails on every optimizer of ``torch.optim``,
        and the file that was there before is lost. ``tests/test_state.py`` tells when that is
        mended. Use this method.

        :param folder: where to, a folder for the state alone.
        :raises RuntimeError: if an experience is being trained or evaluated, or was interrupted.
        :raises TypeError: if a plugin has no ``state_dict``, or one of something that is neither a
            tensor nor a plain value.
        :raises ValueError: if ``folder`` is a file, or holds anything but a state.
        """
        save_strategy(self, folder)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continue from what :meth:`save` has written, as if there had been no interruption.

        Build the strategy like the one that was saved, from the same pretrained backbone, then
        load, then train on the next experience (``strategy.clock.train_exp_counter`` counts those
        done). On the CPU the result is that of the uninterrupted stream, bit for bit. This holds if
        nothing draws random numbers in between: the global generators of Python, numpy and torch
        are set to where they were.

        :param folder: what :meth:`save` was given.
        :raises FileNotFoundError: if there is no state.
        :raises ValueError: if the state is truncated, altered, of another method, backbone or
            adapter; the strategy is then as it was.
        """
        load_strategy(self, folder)


# --------------------------------------------------------------------------------------------------
# The parts of the state


def _collect(strategy: Any) -> State:
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


def _check(strategy: Any, state: State, past: Sequence[Any]) -> None:
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
    if keeps_past(strategy) and len(past) != n_trained:
        raise ValueError(
            f"{name} keeps data of its past experiences, which is not saved; pass the {n_trained} "
            f"that it was trained on as `past` (it has {len(past)})."
        )
    check_random_state(state["random"])


_PARTS = ("model", "optimizer", "plugins", "metrics", "own", "clock", "random")


def _apply(strategy: Any, state: State) -> None:
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


def _undo_steps(strategy: Any) -> Iterable[Callable[[], None]]:
    """What brings the strategy back to where it is now; the last is to be called first."""
    before = clone_state(
        {key: value for key, value in _collect(strategy).items() if key != "optimizer"}
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
    yield partial(_apply, strategy, {**before, "optimizer": nothing})


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


__all__ = [
    "Resumable",
    "load_strategy",
    "load_strategy_state",
    "plugins_without_state",
    "save_strategy",
    "strategy_state",
]

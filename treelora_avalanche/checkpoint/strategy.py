"""Save a strategy between two experiences, and continue in a new process as if nothing had been."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import PeriodicEval

from treelora_avalanche.checkpoint.avalanche_plugins import has_state
from treelora_avalanche.checkpoint.avalanche_strategies import (
    can_be_rebuilt,
    rebuild_memory,
)
from treelora_avalanche.checkpoint.parts import apply, check_fits, collect, undo_steps
from treelora_avalanche.provenance import versions
from treelora_avalanche.state import (
    State,
    backbone_fingerprint,
    load_state,
    save_state,
)

logger = logging.getLogger(__name__)


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
        **collect(strategy),
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
        and not can_be_rebuilt(strategy, plugin)
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
    check_fits(strategy, state, past)
    with ExitStack() as undo:
        # What a plugin refuses is known only when it is asked, and others were loaded before it.
        for step in undo_steps(strategy):
            undo.callback(step)
        apply(strategy, state)
        undo.pop_all()
    strategy.experience = None
    rebuild_memory(strategy, past)
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
        and the file that was there before is lost. ``tests/checkpoint/test_resume.py`` tells when
        that is mended. Use this method.

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


__all__ = [
    "Resumable",
    "load_strategy",
    "load_strategy_state",
    "plugins_without_state",
    "save_strategy",
    "strategy_state",
]

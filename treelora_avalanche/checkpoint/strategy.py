"""Saves a strategy between two experiences, and continues it in a new process."""

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
from treelora_avalanche.checkpoint.parts import (
    apply,
    check_fits,
    collect,
    differing_options,
    prepare_loaded,
    undo_steps,
)
from treelora_avalanche.provenance import versions
from treelora_avalanche.state import (
    State,
    backbone_fingerprint,
    load_state,
    save_state,
)

logger = logging.getLogger(__name__)


def strategy_state(strategy: Any) -> State:
    """Returns everything of a strategy that outlives an experience; tensors are not copied.

    That is: trained parameters and buffers of its model, the state of its optimizer, of each plugin
    and of each metric, Avalanche's counters, and the global random generators. Plugins and metrics
    are identified by their class and their position among those of that class. Of Avalanche's own
    metrics, those of forgetting and transfer span experiences and are saved.

    :param strategy: an Avalanche strategy between two experiences.
    :raises RuntimeError: if an experience is being trained or evaluated, or was interrupted.
    :raises TypeError: if a plugin cannot be saved, see :func:`plugins_without_state`.
    :raises ValueError: if a trained parameter is NaN.
    """
    experience = strategy.experience
    if experience is not None:
        raise RuntimeError(
            "the strategy should be between experiences, but experience "
            f"{experience.current_experience} is being trained or evaluated, or was interrupted. "
            "Save when `strategy.train` has returned."
        )
    stateless = plugins_without_state(strategy)
    if stateless:
        raise TypeError(
            f"plugins should have `state_dict` and `load_state_dict`, but {', '.join(stateless)} "
            "do not. Add both (with an empty dictionary if nothing outlives an experience)."
        )
    parts = collect(strategy)
    broken = [name for name, p in parts["model"]["parameters"].items() if bool(p.isnan().any())]
    if broken:
        raise ValueError(
            "trained parameters should be numbers to be saved, but "
            f"{', '.join(broken[:3])} hold NaN. Load the last state, and lower the learning rate."
        )
    return {
        "strategy": type(strategy).__name__,
        "versions": versions(),
        "backbone": backbone_fingerprint(strategy.model),
        **parts,
    }


def plugins_without_state(strategy: Any) -> list[str]:
    """Returns the class names of plugins with attributes but without a state.

    A plugin needs ``state_dict()`` and ``load_state_dict(state)``, of tensors and plain values,
    unless it has no attributes. Of Avalanche's own, EWC and GEM are supported; and those of its
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
    """Loads a state into a strategy, which then continues exactly as the saved one.

    :param strategy: a strategy built like the one that was saved, from the same pretrained
        backbone. An experience in which its training was interrupted is abandoned.
    :param state: what :func:`strategy_state` returned.
    :param past: the experiences that it was trained on, in order. Avalanche's ``Replay``, ``LwF``
        and ``Cumulative`` need them, because their memory is data of the stream and is not saved;
        other strategies ignore them.
    :raises ValueError: if the state does not fit; the strategy is then unchanged.
    """
    for plugin in strategy.plugins:
        # Some plugins add parameters to the model for the time of an experience.
        if hasattr(plugin, "end_interrupted"):
            plugin.end_interrupted(strategy)
    check_fits(strategy, state, past)
    overruled = differing_options(strategy, state)
    with ExitStack() as undo:
        # A plugin may refuse its state after others were loaded.
        for step in undo_steps(strategy):
            undo.callback(step)
        apply(strategy, state)
        undo.pop_all()
    strategy.experience = None
    rebuild_memory(strategy, past)
    prepare_loaded(strategy)
    if overruled:
        logger.warning(
            "the optimizer goes on with the options of the state, %s; to change one, set it in "
            "`strategy.optimizer.param_groups` after loading",
            ", ".join(overruled),
        )
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
    """Saves any Avalanche strategy whose plugins have state; see :meth:`Resumable.save`.

    :param strategy: an Avalanche strategy between two experiences.
    :param folder: folder of the state.
    """
    save_state(folder, strategy_state(strategy))


def load_strategy(strategy: Any, folder: str | os.PathLike[str], past: Sequence[Any] = ()) -> None:
    """Loads what :func:`save_strategy` has written; see :meth:`Resumable.load`.

    :param strategy: a strategy built like the one that was saved.
    :param folder: folder of the state.
    :param past: see :func:`load_strategy_state`.
    """
    state = load_state(folder)
    try:
        load_strategy_state(strategy, state, past)
    except ValueError as error:
        raise ValueError(f"the state in {folder} cannot be loaded: {error}") from error


class Resumable:
    """Mixin for strategies: saves and loads between experiences. Example::

    strategy.train(benchmark.train_stream[0])
    strategy.save("state")
    ...
    strategy = TreeLoRAStrategy(model)  # in a new process
    strategy.load("state")
    strategy.train(benchmark.train_stream[1])
    """

    def state_dict(self) -> State:
        """Returns the state between two experiences, see :func:`strategy_state`."""
        return strategy_state(self)

    def load_state_dict(self, state: State) -> None:
        """Continues from a state, see :func:`load_strategy_state`.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if the state does not fit; the strategy is then unchanged.
        """
        load_strategy_state(self, state)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Saves between two experiences: all tensors in safetensors, everything else in JSON.

        The pretrained backbone is not saved, only its fingerprint. The folder is complete at every
        moment: it is replaced once the new state is written.

        Avalanche has ``save_checkpoint`` and ``maybe_load_checkpoint`` (in
        ``avalanche.checkpointing``) for this. **They do not work with today's torch**: Avalanche
        0.6 pickles the whole strategy with dill, which fails on every optimizer of ``torch.optim``,
        and the previous file is lost. ``tests/checkpoint/test_resume.py`` fails once that is fixed.
        Use this method.

        :param folder: folder of the state alone.
        :raises RuntimeError: if an experience is being trained or evaluated, or was interrupted.
        :raises TypeError: if a plugin has no ``state_dict``, or one of something that is neither a
            tensor nor a plain value.
        :raises ValueError: if ``folder`` is a file, or holds anything but a state.
        """
        save_strategy(self, folder)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continues from what :meth:`save` has written, as without an interruption.

        Build the strategy like the one that was saved, from the same pretrained backbone; load;
        then train on the next experience (``strategy.clock.train_exp_counter`` counts those done).
        On the CPU the result equals that of the uninterrupted stream bit for bit, provided that
        nothing draws random numbers in between: the global generators of Python, numpy and torch
        are restored.

        :param folder: what :meth:`save` was given.
        :raises FileNotFoundError: if there is no state.
        :raises ValueError: if the state is truncated, altered, of another method, backbone or
            adapter; the strategy is then unchanged.
        """
        load_strategy(self, folder)


__all__ = [
    "Resumable",
    "load_strategy",
    "load_strategy_state",
    "plugins_without_state",
    "save_strategy",
    "strategy_state",
]

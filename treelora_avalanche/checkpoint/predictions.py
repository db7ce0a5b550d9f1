"""The part of a strategy's state that its predictions depend on."""

from __future__ import annotations

from typing import Any

from treelora_avalanche.checkpoint.parts import (
    apply_predicting,
    check_model_fits,
    predicting_parts,
    prepare_loaded,
)
from treelora_avalanche.state import State, backbone_fingerprint, check_keys


def prediction_state(strategy: Any) -> State:
    """Returns the trained parameters and the state of the plugins; tensors are not copied.

    That is :func:`~treelora_avalanche.checkpoint.strategy_state` without optimizer, metrics,
    counters and random generators: enough to predict, not to continue training::

        save_state("model", prediction_state(strategy))
        load_prediction_state(another, load_state("model"))

    :param strategy: an Avalanche strategy between two experiences.
    """
    return {
        "strategy": type(strategy).__name__,
        "backbone": backbone_fingerprint(strategy.model),
        **predicting_parts(strategy),
    }


def load_prediction_state(strategy: Any, state: State) -> None:
    """Loads a state into a strategy, which then predicts as the saved one.

    :param strategy: a strategy built like the one that was saved, from the same pretrained
        backbone; plugins that it lacks are ignored.
    :param state: what :func:`prediction_state` returned.
    :raises ValueError: if the state is of another strategy, backbone or adapter.
    """
    check_keys(state, {"strategy", "backbone", "model", "plugins"}, "the state")
    if state["strategy"] != type(strategy).__name__:
        raise ValueError(
            f"the strategy should be {state['strategy']}, as in the state, but is "
            f"{type(strategy).__name__}. Build {state['strategy']}."
        )
    check_model_fits(strategy, state)
    apply_predicting(strategy, state)
    prepare_loaded(strategy)


__all__ = ["load_prediction_state", "prediction_state"]

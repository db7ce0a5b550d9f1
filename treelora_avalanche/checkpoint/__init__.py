"""Saves a whole strategy between two experiences, and restores it in a new process.

``strategy`` has the interface, ``parts`` the parts of the state, ``predictions`` the state that
predictions depend on; ``avalanche_plugins`` and ``avalanche_strategies`` have the state of
Avalanche's own classes, which have no ``state_dict``.
"""

from treelora_avalanche.checkpoint.predictions import load_prediction_state, prediction_state
from treelora_avalanche.checkpoint.strategy import (
    Resumable,
    load_strategy,
    load_strategy_state,
    plugins_without_state,
    save_strategy,
    strategy_state,
)

__all__ = [
    "Resumable",
    "load_prediction_state",
    "load_strategy",
    "load_strategy_state",
    "plugins_without_state",
    "prediction_state",
    "save_strategy",
    "strategy_state",
]

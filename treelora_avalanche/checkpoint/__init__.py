"""Saves a whole strategy between two experiences, and restores it in a new process."""

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
    "load_strategy",
    "load_strategy_state",
    "plugins_without_state",
    "save_strategy",
    "strategy_state",
]

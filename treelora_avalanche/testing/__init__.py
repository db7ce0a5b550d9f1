"""The contract of a continual-learning strategy, as checks for any Avalanche strategy.

:func:`check_strategy` trains a strategy on a tiny stream and runs all checks; each check is also a
function of its own, on the result of :func:`train_and_record`::

    # my_methods.py
    def make(model):
        return MyStrategy(model, train_epochs=2, evaluator=None)


    # test_my_methods.py
    from treelora_avalanche.testing import check_strategy

    def test_contract():
        check_strategy("my_methods:make")

A failed check raises :class:`ContractError`, an ``AssertionError`` that names the check, the
observation and the remedy.
"""

from treelora_avalanche.testing.checks import (
    check_batch_independence,
    check_frozen_weights,
    check_memory,
    check_new_process,
    check_no_task_labels,
    check_present_data,
    check_strategy,
    check_trainable_weights,
)
from treelora_avalanche.testing.errors import ContractError
from treelora_avalanche.testing.factories import Factories
from treelora_avalanche.testing.predictions import (
    EvaluatedBatch,
    Predictions,
    predict,
    record_evaluation,
)
from treelora_avalanche.testing.tiny import tiny_benchmark, tiny_vit
from treelora_avalanche.testing.training import TrainedStrategy, train_and_record

__all__ = [
    "ContractError",
    "EvaluatedBatch",
    "Factories",
    "Predictions",
    "TrainedStrategy",
    "check_batch_independence",
    "check_frozen_weights",
    "check_memory",
    "check_new_process",
    "check_no_task_labels",
    "check_present_data",
    "check_strategy",
    "check_trainable_weights",
    "predict",
    "record_evaluation",
    "tiny_benchmark",
    "tiny_vit",
    "train_and_record",
]

"""The checks of the contract, each a function on a trained strategy."""

from __future__ import annotations

import tempfile
from concurrent.futures import Executor
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from treelora_avalanche.adapters.classifier import find_classifier
from treelora_avalanche.testing.errors import INFER_THE_TASK, NO_TASK_LABELS, ContractError
from treelora_avalanche.testing.factories import Factory
from treelora_avalanche.testing.predictions import (
    EvaluatedBatch,
    Predictions,
    forward,
    record_evaluation,
    single_thread,
)
from treelora_avalanche.testing.reloading import new_process, reloaded_predictions
from treelora_avalanche.testing.tiny import tiny_benchmark, tiny_vit
from treelora_avalanche.testing.training import TrainedStrategy, train_and_record

TOLERANCE = 1e-5


def check_strategy(
    make_strategy: Factory,
    benchmark: Any = tiny_benchmark,
    *,
    make_model: Factory = tiny_vit,
    trains: bool = True,
    stores_samples: bool = False,
    bytes_per_task: int | None = None,
) -> TrainedStrategy:
    """Trains a strategy on a stream and runs every check of the contract.

    Example::

        def make(model):  # at the top level of a module
            return OGD(model, samples_per_task=4, train_epochs=2, evaluator=None)


        check_strategy(make, bytes_per_task=4 * 4 * 2022)

    The new process imports the module of ``make_strategy``: in a script, call this below
    ``if __name__ == "__main__":``.

    :param make_strategy: ``make_strategy(model) -> strategy``, a function at the top level of a
        module or ``"module:name"``, see :class:`Factories`.
    :param benchmark: a function that returns the benchmark, or the benchmark itself; default
        :func:`tiny_benchmark`. For texts pass one such as
        :func:`~treelora_avalanche.scenarios.TextTasks`, and ``make_model``.
    :param make_model: returns the pretrained model; default :func:`tiny_vit`.
    :param trains: False for a method that trains nothing.
    :param stores_samples: True for a method that replays samples of past experiences.
    :param bytes_per_task: largest growth of the stored bytes per task, 0 for a method whose memory
        is constant; None skips :func:`check_memory`.
    :return: the trained strategy, for further checks.
    :raises ContractError: at the first check that fails.
    """
    trained = train_and_record(make_strategy, make_model=make_model, benchmark=benchmark)
    check_frozen_weights(trained)
    if trains:
        check_trainable_weights(trained)
    check_batch_independence(trained)
    check_no_task_labels(trained)
    check_present_data(trained, stores_samples=stores_samples)
    if bytes_per_task is not None:
        check_memory(trained, bytes_per_task)
    check_new_process(trained)
    return trained


def check_frozen_weights(trained: TrainedStrategy) -> None:
    """Checks that training leaves every frozen parameter unchanged, bit for bit.

    Frozen are the parameters that require no gradient when the strategy is built. The classifier in
    use does not count: it may be set from class statistics.

    :param trained: from :func:`train_and_record`.
    :raises ContractError: if one has changed.
    """
    now = trained.parameters()
    head = find_classifier(trained.strategy.model)
    own = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    changed = [
        name
        for name, value in trained.frozen.items()
        if name in now and id(now[name]) not in own and not torch.equal(value, now[name])
    ]
    if changed:
        raise ContractError(
            "frozen weights",
            f"training changed {len(changed)} of {len(trained.frozen)} frozen tensors, such as "
            f"{changed[0]}.",
            "Pass only trainable parameters to the optimizer, and write to no others.",
        )


def check_trainable_weights(trained: TrainedStrategy, share: float = 0.0) -> None:
    """Checks that training moves trainable parameters.

    :param trained: from :func:`train_and_record`.
    :param share: share of the trainable tensors of which more must have moved; 0 asks for one.
    :raises ContractError: if fewer have moved.
    """
    now = trained.parameters()
    total = len(trained.trainable)
    moved = [n for n, value in trained.trainable.items() if not torch.equal(value, now[n])]
    if len(moved) <= share * total:
        raise ContractError(
            "trainable weights",
            f"training moved {len(moved)} of {total} trainable tensors.",
            "Check requires_grad, the optimizer's parameters and train_epochs; pass trains=False "
            "for a method that trains nothing.",
        )


def check_batch_independence(trained: TrainedStrategy, tolerance: float = TOLERANCE) -> None:
    """Checks that a prediction does not depend on the other samples in its mini-batch.

    Compares logits, and generated texts where there are prompts, of large mini-batches that mix all
    experiences with those of single samples.

    :param trained: from :func:`train_and_record`.
    :param tolerance: largest difference, relative to the largest logit.
    :raises ContractError: if predictions differ.
    """
    together, alone = trained.predictions(64), trained.predictions(1)
    # The unit is the largest logit: those near zero are differences of numbers of that size.
    difference = (together.logits - alone.logits).abs().max() / together.logits.abs().max()
    remedy = "Use no statistics of the mini-batch in the forward pass, and choose per sample."
    if not difference <= tolerance:
        raise ContractError(
            "batch independence",
            f"logits in batches of 64 and of 1 differ by {difference:.2g} of the largest logit.",
            remedy,
        )
    if together.texts != alone.texts:
        different = sum(a != b for a, b in zip(together.texts, alone.texts, strict=True))
        raise ContractError(
            "batch independence",
            f"{different} of {len(alone.texts)} texts generated in batches of 64 and of 1 differ.",
            remedy,
        )


def check_no_task_labels(trained: TrainedStrategy, tolerance: float = TOLERANCE) -> None:
    """Checks that predictions use neither the task label nor the experience.

    Outputs recorded during ``strategy.eval`` must equal those for the same mini-batches without an
    experience, with task label 0 and with one that no experience has.

    :param trained: from :func:`train_and_record`.
    :param tolerance: largest difference, absolute or relative.
    :raises ContractError: if outputs differ, or the strategy fails without them.
    """
    batches = record_evaluation(trained.strategy, trained.benchmark.test_stream)
    unknown = 1 + max(int(batch.task_labels.max()) for batch in batches)
    for label in (0, unknown):
        for batch in batches:
            _compare_without_label(trained.strategy, batch, label, tolerance)


def _compare_without_label(
    strategy: Any, batch: EvaluatedBatch, label: int, tolerance: float
) -> None:
    output = forward(strategy, batch.inputs, batch.targets, label)
    if not _close(output, batch.outputs, tolerance):
        raise ContractError(
            NO_TASK_LABELS,
            f"outputs with task label {label} and no experience differ from those of the "
            "evaluation.",
            INFER_THE_TASK,
        )


def _close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    same_shape = first.shape == second.shape
    return same_shape and torch.allclose(first, second, rtol=tolerance, atol=tolerance)


def check_present_data(trained: TrainedStrategy, *, stores_samples: bool = False) -> None:
    """Checks that training on an experience reads only the samples of that experience.

    Reads are recorded at the data sets of the train and the test stream. Copies of samples that a
    method keeps itself are not seen here, but by :func:`check_memory`.

    :param trained: from :func:`train_and_record`.
    :param stores_samples: whether samples of past experiences may be read again, as by replay.
    :raises ContractError: if other samples were read.
    """
    allowed: set[tuple[int, int]] = set()
    for index, (samples, read) in enumerate(zip(trained.samples, trained.read, strict=True)):
        allowed = allowed | samples if stores_samples else samples
        others = read - allowed
        if others:
            raise ContractError(
                "present data",
                f"training on experience {index} read {len(others)} samples of other experiences "
                "or of the test stream.",
                "Use strategy.experience.dataset alone; declare stores_samples=True for a method "
                "that replays samples of past experiences.",
            )


def check_memory(trained: TrainedStrategy, bytes_per_task: int) -> None:
    """Checks that the memory stored between tasks grows at most by a stated amount per task.

    :param trained: from :func:`train_and_record`.
    :param bytes_per_task: largest growth of
        :func:`~treelora_avalanche.metrics.footprint.stored_bytes`; 0 for constant memory.
    :raises ContractError: if it grows by more from one task to the next.
    :raises ValueError: if the stream has fewer than two experiences.
    """
    if len(trained.stored) < 2:
        raise ValueError(
            f"`benchmark` should have at least 2 experiences, but has {len(trained.stored)}. Memory"
            " growth is the difference between two."
        )
    for index, (before, after) in enumerate(pairwise(trained.stored), 1):
        if after - before > bytes_per_task:
            raise ContractError(
                "memory",
                f"experience {index} added {after - before:,} stored bytes, and {bytes_per_task:,} "
                "are declared.",
                "State the bytes per task in the method's docstring and here, or store less.",
            )


def check_new_process(
    trained: TrainedStrategy, folder: Path | None = None, executor: Executor | None = None
) -> None:
    """Checks that a saved strategy, loaded in a new process, predicts the same bit for bit.

    The new process imports the factories of ``trained``, builds strategy and model, and loads the
    state that :func:`~treelora_avalanche.checkpoint.save_strategy` wrote. A replay method receives
    the experiences of the benchmark that it was trained on.

    :param trained: from :func:`train_and_record`.
    :param folder: an empty folder for the state; default a temporary one.
    :param executor: runs the check in its process, so that several checks share one; default a new
        process.
    :raises ContractError: if saving or loading fails, or predictions differ.
    :raises ValueError: if a factory cannot be imported in a new process.
    """
    trained.factories.importable()
    with single_thread():
        expected = trained.predictions()
    try:
        if folder is not None:
            loaded = _reload(trained, folder, executor)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                loaded = _reload(trained, Path(temporary), executor)
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(
            "new process",
            f"the strategy cannot be saved and loaded ({type(error).__name__}: {error}).",
            "Give every plugin with attributes state_dict() and load_state_dict(); the factories "
            "must build the same model and strategy at every call.",
        ) from error
    _compare_loaded(expected, loaded)


def _reload(trained: TrainedStrategy, folder: Path, executor: Executor | None) -> Predictions:
    if executor is not None:
        return reloaded_predictions(trained, folder, executor)
    with new_process() as own:
        return reloaded_predictions(trained, folder, own)


def _compare_loaded(expected: Predictions, loaded: Predictions) -> None:
    def fail(observation: str) -> NoReturn:
        raise ContractError(
            "new process",
            observation,
            "Whatever predictions depend on belongs in trained parameters, buffers or a plugin's "
            "state_dict().",
        )

    if not torch.equal(expected.logits, loaded.logits):
        fail("logits differ after loading in a new process.")
    if expected.texts != loaded.texts:
        fail("generated texts differ after loading in a new process.")

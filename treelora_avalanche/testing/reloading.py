"""Predictions of a saved strategy in a new process."""

from __future__ import annotations

from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from treelora_avalanche.checkpoint import load_strategy, save_strategy
from treelora_avalanche.testing.factories import Factories
from treelora_avalanche.testing.predictions import Predictions, predict, single_thread
from treelora_avalanche.testing.training import TrainedStrategy


def new_process() -> ProcessPoolExecutor:
    """Returns an executor of one new Python process, which inherits nothing but the import path."""
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


def reloaded_predictions(trained: TrainedStrategy, folder: Path, executor: Executor) -> Predictions:
    """Saves a strategy and returns its predictions after loading in another process.

    :param trained: the strategy.
    :param folder: an empty folder for the state and the predictions.
    :param executor: runs the other process.
    """
    factories = trained.factories.importable()
    save_strategy(trained.strategy, folder / "state")
    # By file: tensors sent through a queue are shared memory of both processes.
    torch.save((trained.inputs, trained.targets, trained.prompts), folder / "test.pt")
    executor.submit(_predict_in_child, factories, folder, len(trained.samples)).result()
    logits, texts = torch.load(folder / "predictions.pt", weights_only=True)
    return Predictions(logits, texts)


def _predict_in_child(factories: Factories, folder: Path, n_experiences: int) -> None:
    strategy, benchmark = factories.build()
    past = [] if benchmark is None else list(benchmark.train_stream)[:n_experiences]
    load_strategy(strategy, folder / "state", past=past)
    inputs, targets, prompts = torch.load(folder / "test.pt", weights_only=True)
    with single_thread():
        predictions = predict(strategy, inputs, targets, prompts)
    torch.save(tuple(predictions), folder / "predictions.pt")

"""Schedule of a run: its stages, and the epochs of each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treelora_avalanche import scenarios
from treelora_avalanche.registry.methods import Method
from treelora_avalanche.registry.settings import EQUAL_EPOCHS, RunSettings
from treelora_avalanche.runs.stream_info import task_names


@dataclass(frozen=True)
class Stage:
    """One call of ``strategy.train``, and the evaluation that follows.

    :param task: the last task of the stage, from 0 in the order of training.
    :param epochs: passes over the data.
    :param train: the experience to train on, or all experiences.
    :param test: the experiences to evaluate: those seen so far.
    """

    task: int
    epochs: int
    train: Any
    test: Any


@dataclass(frozen=True)
class Schedule:
    """Stages and epochs of a run.

    >>> Schedule.plan(METHODS["SeqLoRA"], RunSettings(epochs=2), SplitDigits(5)).epochs
    [2, 2, 2, 2, 2]

    :param epochs: passes over the data of each task, ``(n_tasks,)``.
    :param stages: one per task; a single one if all tasks are trained together.
    :param n_steps: training steps of the whole stream.
    """

    epochs: list[int]
    stages: list[Stage]
    n_steps: int

    @classmethod
    def plan(cls, method: Method, settings: RunSettings, benchmark: Any) -> Schedule:
        """Returns the schedule of a method on a stream.

        :param method: the method.
        :param settings: the method's settings.
        :param benchmark: the stream.
        :raises ValueError: if the numbers of epochs and of tasks differ.
        """
        train, test = benchmark.train_stream, benchmark.test_stream
        epochs = _epochs(method, settings, benchmark)
        last = len(train) - 1
        if method.joint:
            # The mean: with tasks of equal size, as many samples as task by task.
            stages = [Stage(last, round(sum(epochs) / len(epochs)), train, test)]
        else:
            stages = [
                Stage(task, epochs[task], train[task], test[: task + 1]) for task in range(last + 1)
            ]
        samples = [len(experience.dataset) for experience in train]
        return cls(epochs, stages, _count_steps(method, settings, stages, samples))

    def times(self, counts: Sequence[int]) -> int:
        """Returns a total over all epochs, Σ_i epochs_i counts_i.

        :param counts: count of each task in one epoch, such as its samples.
        """
        return sum(e * n for e, n in zip(self.epochs, counts, strict=True))


def _epochs(method: Method, settings: RunSettings, benchmark: Any) -> list[int]:
    names = task_names(benchmark)
    if method.frozen:
        return [1] * len(benchmark.train_stream)
    if names is not None and settings.epochs_per_task is not None:
        return epochs_per_task(method, settings.epochs_per_task, names)
    return [settings.epochs or 1] * len(benchmark.train_stream)


def epochs_per_task(method: Method, wanted: list[int] | str, names: list[str]) -> list[int]:
    """Returns the epochs of each task.

    :param method: the method.
    :param wanted: as in ``RunSettings.epochs_per_task``.
    :param names: names of the tasks.
    :raises ValueError: if the numbers of epochs and of tasks differ.
    """
    if isinstance(wanted, str):
        if wanted == EQUAL_EPOCHS or method.has_tree:
            numbers = scenarios.TREELORA_EPOCHS
        else:
            whole = method.kind == "Avalanche's" and not method.uses_lora
            numbers = scenarios.FULL_EPOCHS if whole else scenarios.LORA_EPOCHS
        return [numbers[name] for name in names]
    if len(wanted) != len(names):
        raise ValueError(
            f"`--epochs_per_task` should have {len(names)} numbers, one for each of "
            f"{', '.join(names)}, but has {len(wanted)}. Pass one number per task."
        )
    return wanted


def _count_steps(
    method: Method, settings: RunSettings, stages: Sequence[Stage], samples: Sequence[int]
) -> int:
    total = 0
    for stage in stages:
        n = sum(samples[: stage.task + 1]) if method.on_all_seen else samples[stage.task]
        batches = math.ceil(n / (settings.batch_size or 1))
        total += math.ceil(batches / settings.accumulation_steps) * stage.epochs
    return total


__all__ = ["Schedule", "Stage", "epochs_per_task"]

"""What is trained when, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from treelora_avalanche import scenarios
from treelora_avalanche.registry.methods import Method
from treelora_avalanche.registry.settings import EQUAL_EPOCHS, RunSettings


@dataclass(frozen=True)
class Stage:
    """What is trained in one go, and what is evaluated then."""

    task: int
    """ The last task of the stage, counted from 0 in the order of training. """
    train: Any
    test: Any

    @classmethod
    def all_of(cls, benchmark: Any, *, joint: bool) -> list[Stage]:
        """The stages of a run.

        :param benchmark: the stream.
        :param joint: whether all tasks are trained together.
        """
        train, test = benchmark.train_stream, benchmark.test_stream
        n = len(train)
        if joint:
            return [cls(n - 1, train, test)]
        # Classes not seen yet have nothing to say.
        return [cls(task, train[task], test[: task + 1]) for task in range(n)]


def epochs_per_task(entry: Method, wanted: list[int] | str, names: list[str]) -> list[int]:
    """Passes over the data of each task.

    :param entry: the method.
    :param wanted: as in `RunSettings.epochs_per_task`.
    :param names: of the tasks.
    :raises ValueError: if there is not one number for each task.
    """
    if isinstance(wanted, str):
        if wanted == EQUAL_EPOCHS or entry.has_tree:
            numbers = scenarios.TREELORA_EPOCHS
        else:
            whole = entry.kind == "Avalanche's" and not entry.uses_lora
            numbers = scenarios.FULL_EPOCHS if whole else scenarios.LORA_EPOCHS
        return [numbers[name] for name in names]
    if len(wanted) != len(names):
        raise ValueError(
            f"`--epochs_per_task` has {len(wanted)} numbers, but there are {len(names)} tasks: "
            f"{', '.join(names)}"
        )
    return wanted


def epochs_of_tasks(
    entry: Method, settings: RunSettings, n_tasks: int, names: list[str] | None
) -> list[int]:
    """Passes over the data of each task."""
    if names is not None and settings.epochs_per_task is not None and not entry.frozen:
        return epochs_per_task(entry, settings.epochs_per_task, names)
    return [entry.epochs(settings)] * n_tasks


def epochs_of_stage(epochs: list[int], stage: Stage, *, joint: bool) -> int:
    # All tasks together: the mean, so that as many samples are seen where tasks are equally large.
    return round(sum(epochs) / len(epochs)) if joint else epochs[stage.task]


def weighted_sum(epochs: list[int], counts: list[int]) -> int:
    return sum(e * n for e, n in zip(epochs, counts, strict=True))


def count_steps(
    entry: Method,
    config: dict[str, Any],
    samples: list[int],
    stages: list[Stage],
    epochs: list[int],
) -> int:
    """Training steps of the whole stream."""
    total = 0
    for stage in stages:
        n = sum(samples[: stage.task + 1]) if entry.on_all_seen else samples[stage.task]
        batches = math.ceil(n / config["batch_size"])
        n_steps = math.ceil(batches / config.get("accumulation_steps", 1))
        total += n_steps * epochs_of_stage(epochs, stage, joint=entry.joint)
    return total

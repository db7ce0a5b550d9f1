"""Validation streams: held-out training samples in place of the test stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from avalanche.benchmarks import CLScenario, benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
from sklearn.model_selection import train_test_split

HELD_OUT = 0.2
"""Default share of the training samples that is held out."""

_OF_TASKS = ("task_names", "domain_names")
_OF_BENCHMARK = ("class_names", "n_classes", "preprocessing")
_OF_EXPERIENCE = ("task_name", "metric", "max_new_tokens")
_OF_SAMPLES = ("prompts", "answers", "sources")


def validation_benchmark(
    benchmark: Any, n_tasks: int, *, share: float = HELD_OUT, seed: int = 0
) -> CLScenario:
    """Returns the first tasks of a benchmark, tested on held-out training samples.

    For the choice of hyper-parameters on the first tasks of a stream (Chaudhry et al. 2019,
    "Efficient Lifelong Learning with A-GEM"). The test stream of the benchmark is never read. Of
    every class (for texts, of every reference answer) the same share is held out where each has at
    least two samples, and one for either part; else the samples are drawn from all.

    Example::

        benchmark = validation_benchmark(SplitDigits(5, seed=0), n_tasks=3)
        len(benchmark.train_stream), len(benchmark.test_stream)  # 3, 3

    :param benchmark: the benchmark.
    :param n_tasks: number of tasks, from the first.
    :param share: share of the training samples of each task that is held out.
    :param seed: seed of the draw.
    :return: the benchmark; it carries the attributes of the original one.
    :raises ValueError: if the stream has fewer tasks, or a task a single sample.
    """
    available = len(benchmark.train_stream)
    if not 1 <= n_tasks <= available:
        raise ValueError(
            f"`n_tasks` (`--tune_tasks`) should be from 1 to {available}, the tasks of the stream, "
            f"but is {n_tasks}. Choose fewer than all: the others should not affect the choice."
        )
    experiences = [benchmark.train_stream[task] for task in range(n_tasks)]
    parts = [_split(experience, share, seed) for experience in experiences]
    built = benchmark_from_datasets(
        train=[e.dataset.subset(kept) for e, (kept, _) in zip(experiences, parts, strict=True)],
        test=[e.dataset.subset(held) for e, (_, held) in zip(experiences, parts, strict=True)],
    )
    if not hasattr(experiences[0], "answers"):  # tokens are no classes
        built = with_classes_timeline(built)
    if all(hasattr(e.dataset, "targets_task_labels") for e in experiences):
        built = with_task_labels(built)
    for number, stream in enumerate((built.train_stream, built.test_stream)):
        for experience, original, indices in zip(stream, experiences, parts, strict=True):
            _copy_attributes(original, experience, indices[number])
    for name in _OF_BENCHMARK:
        if hasattr(benchmark, name):
            setattr(built, name, getattr(benchmark, name))
    for name in _OF_TASKS:
        if getattr(benchmark, name, None) is not None:
            setattr(built, name, list(getattr(benchmark, name))[:n_tasks])
    return built


def _split(experience: Any, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Returns the positions of the samples for training, and of those held out."""
    labels: Sequence[Hashable] = list(getattr(experience, "answers", experience.dataset.targets))
    n_samples = len(labels)
    if n_samples < 2:
        raise ValueError(
            f"task {experience.current_experience} should have at least 2 training samples, one to "
            f"hold out, but has {n_samples}. Add samples, or choose other tasks."
        )
    n_held = min(max(round(share * n_samples), 1), n_samples - 1)
    counts = Counter(labels)
    balanced = min(counts.values()) > 1 and len(counts) <= min(n_held, n_samples - n_held)
    kept, held = train_test_split(
        range(n_samples),
        test_size=n_held,
        random_state=seed,
        stratify=labels if balanced else None,
    )
    return sorted(kept), sorted(held)


def _copy_attributes(original: Any, experience: Any, indices: Sequence[int]) -> None:
    """Copies the attributes of a text task; of those with one value per sample, some values."""
    for name in _OF_EXPERIENCE:
        if hasattr(original, name):
            setattr(experience, name, getattr(original, name))
    for name in _OF_SAMPLES:
        if hasattr(original, name):
            values = getattr(original, name)
            setattr(experience, name, None if values is None else [values[i] for i in indices])


__all__ = ["HELD_OUT", "validation_benchmark"]

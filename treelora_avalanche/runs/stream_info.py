"""Description of a stream: its tasks, classes and sizes, for ``results.json``."""

from __future__ import annotations

from typing import Any

from treelora_avalanche.experiences import classes_of
from treelora_avalanche.metrics.constant_answers import constant_answers
from treelora_avalanche.models.tokens import PADDING


def describe(benchmark: Any) -> dict[str, Any]:
    """Returns the tasks, classes and sizes of a stream.

    :param benchmark: the stream.
    """
    samples = {
        "trained": [e.current_experience for e in benchmark.train_stream],
        "train_samples": [len(e.dataset) for e in benchmark.train_stream],
        "test_samples": [len(e.dataset) for e in benchmark.test_stream],
    }
    names = task_names(benchmark)
    if names is not None:
        return {
            **samples,
            "task_names": names,
            "task_metrics": [e.metric for e in benchmark.test_stream],
            "train_tokens": [count_tokens(e) for e in benchmark.train_stream],
            "constant_answers": [
                _constant_answers(*pair)
                for pair in zip(benchmark.train_stream, benchmark.test_stream, strict=True)
            ],
        }
    return {
        **samples,
        "classes": [classes_of(e) for e in benchmark.train_stream],
        # Avalanche's own benchmarks do not name their classes.
        "class_names": list(getattr(benchmark, "class_names", range(benchmark.n_classes))),
        "domain_names": getattr(benchmark, "domain_names", None),
    }


def _constant_answers(train: Any, test: Any) -> dict[str, Any] | None:
    """Returns the scores of the majority answer and of chance on a task of few answers."""
    known = getattr(train, "answers", ())  # which training itself does not need
    sources = getattr(test, "sources", None)
    scores = constant_answers(test.metric, known, test.answers, sources)
    return scores._asdict() if scores else None


def task_names(benchmark: Any) -> list[str] | None:
    """Returns the names of tasks of text; None for streams of classes.

    :param benchmark: the stream.
    """
    names = [getattr(e, "task_name", None) for e in benchmark.train_stream]
    return None if None in names else [str(name) for name in names]


def count_tokens(experience: Any) -> int:
    """Returns the number of tokens in an experience, without padding.

    :param experience: an experience of texts.
    """
    return sum(int((sample[0] != PADDING).sum()) for sample in experience.dataset)


def learned_in(stream: dict[str, Any], task: int) -> dict[str, Any]:
    """Returns the name or the classes of a task, by key.

    :param stream: from :func:`describe`.
    :param task: index of the task, from 0.
    """
    if "task_names" in stream:
        return {"task_name": stream["task_names"][task]}
    return {"classes": stream["classes"][task]}

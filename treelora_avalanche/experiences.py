"""Reads the experiences of any Avalanche benchmark: their classes and tasks.

Avalanche's generators attach different attributes to an experience: only some know its classes, and
the parts of an online stream know the experience that they were cut from.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any
from weakref import WeakKeyDictionary

_read: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
"""Classes of experiences whose samples had to be read, by experience."""


def classes_of(experience: Any) -> list[int]:
    """Returns the classes of an experience, in ascending order.

    They are its ``classes_in_this_experience``, or else the targets of its dataset, or else those
    of its samples, which are read once. A part of an online stream has the classes of the
    experience that it was cut from: which of them a part holds is chance.

    >>> classes_of(benchmark_from_datasets(train=[dataset]).train_stream[0])
    [0, 1]

    :param experience: an experience of any benchmark with a dataset of images or texts and classes.
    """
    if is_part(experience):
        return classes_of(origin_of(experience))
    known = getattr(experience, "classes_in_this_experience", None)
    if known is not None:
        return sorted(known)
    dataset = experience.dataset
    targets = getattr(dataset, "targets", None)
    if targets is not None:
        # Avalanche keeps the distinct ones.
        return sorted({int(target) for target in getattr(targets, "uniques", targets)})
    if experience not in _read:
        _read[experience] = sorted({int(sample[1]) for sample in dataset.eval()})
    return _read[experience]


def samples_of(experience: Any) -> Any:
    """Returns the dataset of an experience as the benchmark holds it, in evaluation mode.

    An :class:`~treelora_avalanche.plugins.ActivationCachePlugin` gives strategies a copy of the
    experience that holds hidden states in place of samples.

    :param experience: an experience of any stream.
    """
    return getattr(experience, "uncached_dataset", experience.dataset).eval()


def origin_of(experience: Any) -> Any | None:
    """Returns the experience that a part of an online stream was cut from.

    :param experience: an experience of any stream.
    :return: the experience itself where it is no part; None for a part of several experiences
        (``split_continuous_linear_decay_stream``).
    """
    try:
        return getattr(experience, "origin_experience", experience)
    except ValueError:  # Avalanche hides it in `experience.train()`
        return experience


def is_part(experience: Any) -> bool:
    """Returns whether an experience was cut from a single other one, as in an online stream.

    :param experience: an experience of any stream.
    """
    origin = origin_of(experience)
    return origin is not None and origin is not experience


def n_parts(experience: Any) -> int:
    """Returns the number of parts of the task that an experience belongs to; 1 if unknown.

    :param experience: an experience of any stream.
    """
    return (is_part(experience) and experience.sub_stream_length) or 1


def task_number(experience: Any) -> int | None:
    """Returns the number of the task in its stream, which the parts of a task share.

    :param experience: an experience of any stream.
    :return: None for a part of several tasks, or where the task has no number.
    """
    origin = origin_of(experience)
    try:
        return None if origin is None else int(origin.current_experience)
    except AssertionError:  # Avalanche's, outside a stream
        return None


def stream_length(experience: Any) -> int | None:
    """Returns the number of tasks in the stream of an experience; of a part, in that of its origin.

    :param experience: an experience of any stream.
    :return: None where it is unknown: outside a stream, and in one that is generated on the way.
    """
    origin = origin_of(experience)
    # The public `origin_stream` raises an AssertionError where there is none.
    stream = getattr(experience if origin is None else origin, "_origin_stream", None)
    for found in (stream, getattr(stream, "exps_iter", None)):
        if isinstance(found, Sized):
            return len(found)
    return None

"""Records which samples of a stream are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import Dataset

Sample = tuple[int, int]
"""A sample of a stream: the identity of the data set at the bottom, and the index in it."""


def _leaves(dataset: Any) -> Iterator[Any]:
    """The data sets at the bottom, below Avalanche's and torch's subsets and concatenations."""
    parts = [
        getattr(dataset, "_flat_data", None),
        *(getattr(dataset, "_datasets", None) or getattr(dataset, "datasets", None) or ()),
        getattr(dataset, "dataset", None),
    ]
    below = [part for part in parts if isinstance(part, Dataset) or hasattr(part, "_datasets")]
    if not below:
        yield dataset
    for part in below:
        yield from _leaves(part)


class ReadRecorder:
    """Records the samples that are read from the streams of a benchmark, by index.

    The classes of the data sets at the bottom are instrumented while :meth:`recording` is active,
    so that a read is noticed on whatever way it comes, but not one by a worker process.

    >>> recorder = ReadRecorder(benchmark.train_stream)
    >>> with recorder.recording() as read:
    ...     strategy.train(benchmark.train_stream[0])
    >>> read <= recorder.samples_of(benchmark.train_stream[0].dataset)
    True

    :param experiences: the experiences whose data are watched.
    """

    def __init__(self, experiences: Iterable[Any]):
        # Kept, so that no other object gets the identity of one.
        self._leaves = [leaf for e in experiences for leaf in _leaves(e.dataset)]

    @contextmanager
    def recording(self) -> Iterator[set[Sample]]:
        """Records inside the context; yields the set of samples, which grows."""
        read: set[Sample] = set()
        classes = {type(leaf) for leaf in self._leaves}
        own = {cls: vars(cls).get("__getitem__") for cls in classes}
        for cls in classes:
            cls.__getitem__ = _recorded(cls.__getitem__, read)
        try:
            yield read
        finally:
            for cls, original in own.items():
                if original is None:
                    del cls.__getitem__  # the parent's stands again
                else:
                    cls.__getitem__ = original

    def samples_of(self, dataset: Any) -> set[Sample]:
        """Returns the samples of a data set, which is read once.

        :param dataset: that of an experience.
        """
        with self.recording() as read:
            for index in range(len(dataset)):
                dataset[index]
        return read


def _recorded(original: Any, read: set[Sample]) -> Any:
    def __getitem__(self: Any, index: Any) -> Any:
        chosen = range(len(self))[index]
        read.update((id(self), i) for i in (chosen if isinstance(chosen, range) else [chosen]))
        return original(self, index)

    return __getitem__

"""Processes that share passes without gradients, and gather the results."""

from __future__ import annotations

import math
import socket
import tempfile
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from avalanche.benchmarks.utils.data_loader import MultiDatasetDataLoader
from torch import Tensor

Item = TypeVar("Item")


class Processes:
    """Divides a list of items between processes, and gathers their results.

    All methods that gather are collective: every process calls them, in the same order. Example::

        processes = Processes(accelerator)
        rows = processes.part(len(x))  # of this process
        logits = processes.whole(model(x[rows]), len(x))  # of all

    :param accelerator: the processes, started by accelerate.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        # Only processes of one machine can share a memory-mapped file.
        machines: list[str] = self.of_all(socket.gethostname())
        here = [rank for rank, name in enumerate(machines) if name == socket.gethostname()]
        self._first_here = here[0]
        self._place_here = here.index(accelerator.process_index)
        self._n_here = len(here)

    def part(self, n: int, unit: int = 1) -> list[int]:
        """Returns the indices of the items of this process; the last one may get fewer.

        :param n: number of items, at least 1.
        :param unit: number of items that stay together, such as a batch: in the same batches, sums
            are rounded as in one process.
        :return: the indices; a process without items gets the last one, which is another's too.
        """
        size = self._size(n, unit)
        start = self.accelerator.process_index * size
        return list(range(start, min(start + size, n))) or [n - 1]

    def _size(self, n: int, unit: int) -> int:
        return math.ceil(n / unit / self.accelerator.num_processes) * unit

    def whole(self, part: Tensor, n: int, unit: int = 1) -> Tensor:
        """Returns the results of all processes, in order, ``(n, ...)``.

        :param part: results of this process, ``(len(part), ...)``.
        :param n: see :meth:`part`.
        :param unit: see :meth:`part`.
        """
        rows = part.new_zeros(self._size(n, unit), *part.shape[1:])
        rows[: len(part)] = part
        gathered: Tensor = self.accelerator.gather(rows)
        return gathered[:n]

    def whole_list(self, part: list[Item], n: int) -> list[Item]:
        """Returns the results of all processes as a list, in order.

        :param part: results of this process.
        :param n: see :meth:`part`.
        """
        gathered: list[Item] = gather_object(part)
        return gathered[:n]

    def of_all(self, item: Item) -> list[Item]:
        """Returns one item of each process, by rank; waits for all of them.

        :param item: the item of this process.
        """
        gathered: list[Item] = gather_object([item])
        return gathered

    def part_here(self, n: int) -> list[int]:
        """Returns the indices of this process, where each machine computes all items.

        :param n: number of items.
        """
        return list(range(self._place_here, n, self._n_here))

    def tensor_here(self, shape: tuple[int, ...], dtype: torch.dtype, room: bool) -> Tensor | None:
        """Returns a memory-mapped tensor that the processes of this machine share.

        :param shape: shape of the tensor.
        :param dtype: dtype of the tensor.
        :param room: whether this process finds enough disk space for it.
        :return: the tensor; None if any process finds too little space.
        """
        if not all(self.of_all(room)):
            return None
        size = math.prod(shape)
        # The file is unlinked when this returns; it lives as long as the mappings.
        with tempfile.NamedTemporaryFile(prefix="treelora-activations-") as file:
            name = self.of_all(file.name)[self._first_here]
            tensor = torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
            self.of_all("opened")
        return tensor


def whole_batches(loader: Any) -> None:
    """Turns off Avalanche's own division of a loader's data, which repeats samples at the end.

    :param loader: any loader.
    """
    if isinstance(loader, MultiDatasetDataLoader):
        loader.distributed_sampling = False


def shared_work(strategy: Any) -> Processes | None:
    """Returns the processes that share a strategy's passes without gradients; None if it is alone.

    :param strategy: a strategy.
    """
    plugin = next((p for p in strategy.plugins if hasattr(p, "shared_processes")), None)
    processes: Processes | None = plugin.shared_processes if plugin else None
    return processes

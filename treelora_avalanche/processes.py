"""Processes that divide work, and bring together what each of them has done."""

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
    """How processes divide a list of things, and bring together what each has made of its part.

    Every process has to call each method, in the same order.

    :param accelerator: the processes, as accelerate has started them.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        # What lies in a file is shared by the processes of one machine.
        machines: list[str] = self.of_all(socket.gethostname())
        here = [rank for rank, name in enumerate(machines) if name == socket.gethostname()]
        self._first_here = here[0]
        self._place_here = here.index(accelerator.process_index)
        self._n_here = len(here)

    def part(self, n: int, unit: int = 1) -> list[int]:
        """Numbers of the things that are for this process; those for the last may be fewer.

        :param n: number of things, at least one.
        :param unit: how many stay together, such as a batch: computed in the same batches, numbers
            are rounded as in one process.
        :return: of a process for which nothing is left, the last thing alone, which is for another.
        """
        size = self._size(n, unit)
        start = self.accelerator.process_index * size
        return list(range(start, min(start + size, n))) or [n - 1]

    def _size(self, n: int, unit: int) -> int:
        return math.ceil(n / unit / self.accelerator.num_processes) * unit

    def whole(self, part: Tensor, n: int, unit: int = 1) -> Tensor:
        """What all processes have made of the things, in order.

        :param part: what this one has made of its part, a row for each.
        :param n: see :meth:`part`.
        :param unit: see :meth:`part`.
        """
        rows = part.new_zeros(self._size(n, unit), *part.shape[1:])
        rows[: len(part)] = part
        gathered: Tensor = self.accelerator.gather(rows)
        return gathered[:n]

    def whole_list(self, part: list[Item], n: int) -> list[Item]:
        """The same of a list.

        :param part: what this process has made of its part.
        :param n: see :meth:`part`.
        """
        gathered: list[Item] = gather_object(part)
        return gathered[:n]

    def of_all(self, item: Item) -> list[Item]:
        """What every process has to say. Waits for all of them.

        :param item: what this one says.
        """
        gathered: list[Item] = gather_object([item])
        return gathered

    def part_here(self, n: int) -> list[int]:
        """Numbers of the things that are for this process and no other of this machine.

        :param n: number of things.
        """
        return list(range(self._place_here, n, self._n_here))

    def tensor_here(self, shape: tuple[int, ...], dtype: torch.dtype, room: bool) -> Tensor | None:
        """A tensor that all processes of this machine have in common, in a memory-mapped file.

        :param shape: of the tensor.
        :param dtype: of the tensor.
        :param room: whether this process sees enough room for it on the disk.
        :return: None if any process sees none.
        """
        if not all(self.of_all(room)):
            return None
        size = math.prod(shape)
        # The file has no name any more when this returns; it lives as long as the mappings.
        with tempfile.NamedTemporaryFile(prefix="treelora-prefix-") as file:
            name = self.of_all(file.name)[self._first_here]
            tensor = torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
            self.of_all("opened")
        return tensor


def whole_batches(loader: Any) -> None:
    """Keeps Avalanche from dividing a loader's data itself, with repeated samples at the end.

    :param loader: any loader.
    """
    if isinstance(loader, MultiDatasetDataLoader):
        loader.distributed_sampling = False


def shared_work(strategy: Any) -> Processes | None:
    """The processes that divide a strategy's passes without gradients; None if it is alone.

    :param strategy: a strategy.
    """
    plugin = next((p for p in strategy.plugins if hasattr(p, "shared_processes")), None)
    processes: Processes | None = plugin.shared_processes if plugin else None
    return processes

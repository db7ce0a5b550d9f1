"""One run in several processes, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


def n_processes() -> int:
    """How many processes there are, by what the launcher has told this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


@cache
def _accelerator(cpu: bool) -> Accelerator:
    from accelerate import Accelerator

    return Accelerator(cpu=cpu)


@contextmanager
def one_folder(output: str | None, device: str) -> Iterator[str | None]:
    """Lets the first process alone write to a run folder, and print.

    Every process makes the same run, and so all files. Those of the others go to a folder of their
    own that is deleted; it starts as a copy, since an interrupted run must be continued by all.

    :param output: the run folder, which all processes can read.
    :param device: the device of the settings.
    :return: the folder of this process.
    :raises ValueError: if there are several processes and no folder.
    """
    if n_processes() == 1:
        yield output
        return
    if output is None:
        raise ValueError(
            "`--output` is not given, and several processes need to know one folder; set it"
        )
    accelerator = _accelerator(device == "cpu")
    if is_first():
        accelerator.wait_for_everyone()
        yield output
    else:
        with tempfile.TemporaryDirectory() as own, open(os.devnull, "w") as nowhere:
            if os.path.isdir(output):
                shutil.copytree(output, own, dirs_exist_ok=True)
            accelerator.wait_for_everyone()
            with redirect_stdout(nowhere):
                yield own
    accelerator.end_training()


def parallel_plugins(device: str, *, shard_backbone: bool = False) -> list[Any]:
    """What a strategy needs to share its work with the other processes; nothing if it is alone.

    :param device: the device of the settings.
    :param shard_backbone: see :class:`~treelora_avalanche.plugins.DataParallelPlugin`.
    :raises ValueError: if weights are to be divided among one process.
    """
    if n_processes() == 1:
        if shard_backbone:
            raise ValueError(
                "`--shard_backbone` divides weights among processes, and there is one; start "
                "several with torchrun or accelerate launch"
            )
        return []
    from treelora_avalanche.plugins import DataParallelPlugin

    accelerator = _accelerator(device == "cpu")
    return [DataParallelPlugin(accelerator, shard_backbone=shard_backbone)]


__all__ = ["is_first", "n_processes", "one_folder", "parallel_plugins"]

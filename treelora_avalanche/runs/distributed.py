"""Runs in several processes, started by ``torchrun`` or ``accelerate launch``."""

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
    """Returns the number of processes, as set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Returns whether this process is the one that writes files."""
    return os.environ.get("RANK", "0") == "0"


@cache
def _accelerator(cpu: bool) -> Accelerator:
    from accelerate import Accelerator

    return Accelerator(cpu=cpu)


@contextmanager
def one_folder(output: str | None, device: str) -> Iterator[str | None]:
    """Yields the folder of this process; only the first process writes to the run folder.

    All processes make the same run and write the same files. The others write to temporary folders
    and do not print; these start as copies, since all processes resume an interrupted run.

    :param output: the run folder, readable by all processes.
    :param device: the device of the settings.
    :raises ValueError: if there are several processes and no folder.
    """
    if n_processes() == 1:
        yield output
        return
    if output is None:
        raise ValueError(
            "`--output` should be a folder that all processes share, but is not given. Pass "
            "`--output FOLDER`."
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
    """Returns the plugins of data-parallel training; none in a single process.

    :param device: the device of the settings.
    :param shard_backbone: see :class:`~treelora_avalanche.plugins.DataParallelPlugin`.
    :raises ValueError: if weights are to be sharded in a single process.
    """
    if n_processes() == 1:
        if shard_backbone:
            raise ValueError(
                "`--shard_backbone` should be used with several processes, but there is 1. Start "
                "more with torchrun or accelerate launch."
            )
        return []
    from treelora_avalanche.plugins import DataParallelPlugin

    accelerator = _accelerator(device == "cpu")
    return [DataParallelPlugin(accelerator, shard_backbone=shard_backbone)]


__all__ = ["is_first", "n_processes", "one_folder", "parallel_plugins"]

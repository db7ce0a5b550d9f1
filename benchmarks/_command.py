"""Command line, clocks, tables and data paths that the benchmarks share."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

Clock = Callable[[], float]

DATA = os.environ.get("TREELORA_DATA", "../shared/data")


def required_path(data: Path, name: str) -> Path:
    """Returns ``data / name``.

    :param data: the folder of data sets and weights.
    :param name: a path in it.
    :raises FileNotFoundError: if it is missing.
    """
    if not (data / name).exists():
        raise FileNotFoundError(f"{data / name} is missing (set TREELORA_DATA)")
    return data / name


def chosen_clock(cpu_time: bool) -> Clock:
    """Returns a clock of wall time or of processor time, in seconds.

    :param cpu_time: whether to count the processor time of this process: for one thread
        (``OMP_NUM_THREADS=1``) on a machine that runs other work too.
    """
    return time.process_time if cpu_time else time.perf_counter


def clock_note(cpu_time: bool) -> str:
    """Returns the part of a table's title that names the clock.

    :param cpu_time: see :func:`chosen_clock`.
    """
    return ", processor time" if cpu_time else ""


def synchronize(device: str | torch.device) -> None:
    """Waits for all work on a device.

    :param device: the device; nothing to wait for on a CPU.
    """
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Returns p of ``value ~ size ** p``, by least squares on the logarithms.

    :param sizes: the sizes.
    :param values: the value measured at each size.
    :return: NaN if there is one size only.
    """
    if len(sizes) < 2:
        return math.nan
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    return linear_regression(x, y).slope


def new_table(title: str, columns: Iterable[str], n_left: int = 1, **options: Any) -> Table:
    """Returns an empty table.

    :param title: its title.
    :param columns: headers of the columns.
    :param n_left: number of columns, from the left, that are left-aligned; the others are numbers.
    :param options: further arguments of :class:`rich.table.Table`.
    """
    table = Table(title=title, **options)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < n_left else "right")
    return table


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a table whose first column is text.

    :param title: its title.
    :param columns: headers of the columns.
    :param rows: cells of each row.
    """
    table = new_table(title, columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def run(benchmark: Callable[..., list[str]]) -> None:
    """Runs a benchmark; with ``--check``, exits with 1 if a target is missed.

    :param benchmark: a function that prints its table and returns a line for every missed target.
    """
    parser = ArgumentParser(description=sys.modules[benchmark.__module__].__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_function_arguments(benchmark)
    arguments = parser.parse_args().as_dict()
    check = arguments.pop("check")
    warnings.simplefilter("ignore")
    warnings.showwarning = lambda *_, **__: None  # Avalanche installs its own filters
    missed = benchmark(**arguments)
    for line in missed:
        print("missed:", line)
    if check and missed:
        sys.exit(1)

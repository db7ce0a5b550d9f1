"""What benchmarks share: their command line, the clock, and the exponent of a growth."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from statistics import linear_regression

from jsonargparse import ArgumentParser

Clock = Callable[[], float]


def chosen_clock(cpu_time: bool) -> Clock:
    """Seconds of the wall, or those that this process has had on the processor.

    :param cpu_time: the latter: for one thread (``OMP_NUM_THREADS=1``) on a machine that does other
        work too.
    """
    return time.process_time if cpu_time else time.perf_counter


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of the size that the values grow by: the slope in logarithms, by least squares.

    :param sizes: what grows.
    :param values: what was measured at each size.
    :return: not a number if there is one size only.
    """
    if len(sizes) < 2:
        return math.nan
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    return linear_regression(x, y).slope


def run(benchmark: Callable[..., list[str]]) -> None:
    """Runs a benchmark; with ``--check``, exits with 1 and names the targets that it missed.

    :param benchmark: a function that prints its table and returns a line for every missed target.
    """
    parser = ArgumentParser(description=sys.modules[benchmark.__module__].__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_function_arguments(benchmark)
    arguments = parser.parse_args().as_dict()
    check = arguments.pop("check")
    missed = benchmark(**arguments)
    for line in missed:
        print("missed:", line)
    if check and missed:
        sys.exit(1)

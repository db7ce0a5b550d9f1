"""The command line of a benchmark: its function's parameters, and ``--check``."""

from __future__ import annotations

import sys
from collections.abc import Callable

from jsonargparse import ArgumentParser


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

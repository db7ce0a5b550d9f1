"""Executors: run the cells of a comparison in parallel, in processes or as SLURM jobs."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from treelora_avalanche.choices import EXECUTORS, check_known
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs import run, write_text

SUBMITIT = {"partition": "slurm_partition", "time": "timeout_min", "gpus_per_job": "gpus_per_node"}

Task = tuple[str, int, RunSettings, Path]


def attempt(
    method: str, seed: int, settings: RunSettings, folder: Path, **options: Any
) -> str | None:
    """Makes one run and catches its errors, so that they do not stop other runs.

    :param method: name of the method.
    :param seed: the run's seed.
    :param settings: the settings.
    :param folder: the run folder; if the run fails, ``error.txt`` there has the traceback.
    :param options: further arguments of :func:`~treelora_avalanche.runs.run`.
    :return: the error as one line; None if there was none.
    """
    try:
        run(method, seed, settings, folder, **options)
    except Exception as error:
        if folder.is_dir():
            write_text(folder / "error.txt", traceback.format_exc())
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def settings_of_jobs(
    settings: RunSettings, executor: str, options: Mapping[str, Any]
) -> RunSettings:
    """Returns the settings with a device that does not depend on the submitting machine.

    :param settings: the settings.
    :param executor: one of :data:`~treelora_avalanche.choices.EXECUTORS`.
    :param options: see :func:`attempt_all`.
    :raises ValueError: if there is no such executor.
    """
    check_known("`--executor`", executor, EXECUTORS)
    if executor == "slurm" and settings.device == "auto":
        return replace(settings, device="cuda" if options.get("gpus_per_job", 1) else "cpu")
    return settings


def attempt_all(
    tasks: Sequence[Task], executor: str, options: Mapping[str, Any], output: Path
) -> Iterator[tuple[int, str | None]]:
    """Makes many runs in parallel.

    :param tasks: the arguments of :func:`attempt`, one tuple per run.
    :param executor: ``"processes"``, on this machine, spread over its GPUs; or ``"slurm"``, one job
        per run.
    :param options: of processes: ``workers``, the number of processes (default: one per GPU, at
        least 1). Of SLURM: ``time``, the time limit of a job in minutes (required);
        ``partition``, ``gpus_per_job`` (1), and other parameters of submitit's
        ``update_parameters``; ``cluster: local`` runs jobs without SLURM.
    :param output: folder of the run folders; submitit's files go to ``jobs`` in it.
    :return: iterator of the index of a task and the result of :func:`attempt`, as runs end.
    :raises ValueError: if the executor cannot be used, or an option is unknown.
    """
    check_known("`--executor`", executor, EXECUTORS)
    if executor == "slurm":
        yield from _as_jobs(tasks, options, output / "jobs")
    else:
        yield from _in_processes(tasks, **_process_options(options))


def _process_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        check_known("`--executor_options`", name, ("workers",))
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`workers` should be an integer of at least 1, but is {value!r}. Correct "
                "`--executor_options`."
            )
    return dict(options)


def _in_processes(
    tasks: Sequence[Task], workers: int | None = None
) -> Iterator[tuple[int, str | None]]:
    gpus = visible_gpus(tasks[0][2].device)
    workers = min(workers or max(1, len(gpus)), len(tasks))
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for worker in range(workers):
        free.put(gpus[worker % len(gpus)] if gpus else None)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=take_gpu, initargs=(free,)
    ) as pool:
        runs = {pool.submit(attempt, *task): number for number, task in enumerate(tasks)}
        for done in as_completed(runs):
            error = done.exception()  # of the process itself
            yield runs[done], done.result() if error is None else f"{type(error).__name__}: {error}"


def visible_gpus(device: str) -> list[str]:
    """Returns the GPUs to spread runs over; none if the device names one, or the CPU.

    :param device: the device of the settings.
    """
    if device not in ("auto", "cuda"):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    n_gpus = torch.cuda.device_count()
    return named.split(",")[:n_gpus] if named else [str(number) for number in range(n_gpus)]


def take_gpu(free: Any) -> None:
    """Makes one GPU the only visible one of this process.

    :param free: queue of free GPUs; None in it stands for no GPU.
    """
    gpu = free.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before CUDA is initialised here


def _as_jobs(
    tasks: Sequence[Task], options: Mapping[str, Any], folder: Path
) -> Iterator[tuple[int, str | None]]:
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "`--executor` should be processes where submitit is not installed, but is slurm. Run "
            "pip install 'treelora-avalanche[slurm]'."
        ) from error
    if "time" not in options:
        raise ValueError(
            "`--executor_options` should have `time`, the time limit of a job in minutes, but has "
            f"{', '.join(options) or 'none'}. Add it, as in {{time: 240}}."
        )
    given = {"gpus_per_job": 1, **options}
    cluster = given.pop("cluster", "slurm")
    parameters = {SUBMITIT.get(name, name): value for name, value in given.items()}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(name="treelora", **parameters)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ValueError(f"`--executor slurm` cannot be used here: {error}") from error
    with executor.batch():  # one array of jobs
        jobs = [executor.submit(attempt, *task) for task in tasks]
    for number, job in enumerate(jobs):
        failure = job.exception()  # cancelled, out of time or memory
        yield number, job.result() if failure is None else f"{type(failure).__name__}: {failure}"


__all__ = [
    "EXECUTORS",
    "attempt",
    "attempt_all",
    "settings_of_jobs",
    "take_gpu",
    "visible_gpus",
]

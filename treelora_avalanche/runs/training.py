"""Trains a run, from the start or from an interruption, to its results."""

from __future__ import annotations

from typing import Any

from treelora_avalanche.runs.folder import (
    remove_state,
    write_results,
)
from treelora_avalanche.runs.results import results_of
from treelora_avalanche.runs.resume import (
    Interrupted,
    Progressed,
)
from treelora_avalanche.runs.session import Job, Session


def train_stream(job: Job, interrupted: Interrupted | None = None) -> dict[str, Any]:
    """Trains and evaluates the remaining stages, and writes the run folder.

    :param job: the run.
    :param interrupted: the state to resume from; by default the run starts with the first task.
    :return: the content of ``results.json``.
    :raises CannotContinueError: if the state does not fit the strategy.
    """
    session = Session(job, interrupted.progress if interrupted else Progressed())
    measure_final = session.measure_base()  # outside of the measured time and memory
    try:
        with session.memory:
            session.build()
            if interrupted is not None:
                session.load(interrupted)
            for stage in session.remaining:
                session.train(stage)
                session.evaluate(stage)
                session.save(stage)
        measure_final()
    finally:
        session.record.close()
    session.save_model()
    written = write_results(job.folder, results_of(session))
    remove_state(job.folder)
    return written


__all__ = ["train_stream"]

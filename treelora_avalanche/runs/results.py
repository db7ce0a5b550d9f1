"""Results of a run: scores, accuracy matrices, times, memory and provenance."""

from __future__ import annotations

import time
from typing import Any

from treelora_avalanche.metrics.footprint import count_parameters, stored_bytes
from treelora_avalanche.provenance import git_hash, hardware, versions
from treelora_avalanche.runs.fingerprints import fingerprints
from treelora_avalanche.runs.folder import SCHEMA_VERSION
from treelora_avalanche.runs.session import Session


def results_of(session: Session) -> dict[str, Any]:
    """Returns the content of ``results.json``.

    :param session: the run, after its last stage.
    """
    config, epochs = session.job.config, session.schedule.epochs
    return {
        "schema_version": SCHEMA_VERSION,
        "method": config["method"],
        "seed": config["seed"],
        "config": config,
        # Tasks of text may differ in their epochs.
        "epochs": epochs if session.settings.on_language else epochs[0],
        "metrics": session.scores,
        # Row: after training on the j-th task; column: the i-th task, in the order of training.
        # Null where not evaluated: before a task is seen, and, if all tasks are trained together,
        # in every row but the last.
        "accuracy_matrix": {kind: matrix.tolist() for kind, matrix in session.accuracy.items()},
        "stream": session.stream,
        "trees": session.trees or None,
        "routes": session.routes,
        # Of language models: general abilities, on text that is none of the tasks.
        "plain_text": session.plain_text,
        "timings": _timings(session),
        "memory": {
            "peak_bytes": session.memory.bytes,
            "peak_kind": session.memory.kind,
            "stored_bytes": stored_bytes(session.strategy),
        },
        "parameters": count_parameters(session.strategy.model, trained=not session.method.frozen),
        "versions": versions(),
        "git_hash": git_hash(),
        "fingerprints": fingerprints(config, session.job.ingredients.known),
        "hardware": hardware(session.device),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _timings(session: Session) -> dict[str, Any]:
    seconds, steps = session.training.seconds, session.counter.step
    # Samples of the stream: those that a method replays do not count again.
    times = session.schedule.times
    timings = {
        "train_seconds": seconds,
        "ms_per_step": 1000 * seconds / steps if steps else None,
        "samples_per_second": times(session.stream["train_samples"]) / seconds,
        "eval_seconds": session.evaluating.seconds,
        "steps": steps,
    }
    if session.settings.on_language:
        timings["tokens_per_second"] = times(session.stream["train_tokens"]) / seconds
    return timings


__all__ = ["results_of"]

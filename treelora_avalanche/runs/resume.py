"""Resumes an interrupted run after its last finished task."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from treelora_avalanche._version import __version__
from treelora_avalanche.checkpoint import plugins_without_state, strategy_state
from treelora_avalanche.runs.folder import SCHEMA_VERSION, STATE, is_unfinished
from treelora_avalanche.state import check_keys, has_state, load_state, save_state


class CannotContinueError(ValueError):
    """Raised if the state of an interrupted run is damaged, of another version, or does not fit."""


@dataclass(frozen=True)
class Progressed:
    """State of a run after a task, without its strategy.

    :param stages: number of finished stages: tasks, unless all tasks are trained together.
    :param train_seconds: time of training so far.
    :param eval_seconds: time of evaluation so far.
    :param peak_bytes: peak memory so far.
    :param trees: TreeLoRA's tree after each task; empty for other methods.
    :param lines: number of lines of each growing file.
    """

    stages: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    peak_bytes: int = 0
    trees: list[Any] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Interrupted:
    """State of an interrupted run.

    :param progress: the state of the run.
    :param strategy: the state of the strategy, for
        :func:`~treelora_avalanche.checkpoint.load_strategy_state`.
    """

    progress: Progressed
    strategy: dict[str, Any]


def save_progress(folder: Path, strategy: Any, progress: Progressed) -> None:
    """Saves the state that the run resumes from if it is interrupted.

    :param folder: the run folder.
    :param strategy: the strategy, after the evaluation of a task.
    :param progress: the state of the run.
    """
    state = {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "progress": asdict(progress),
        "strategy": strategy_state(strategy),
    }
    save_state(folder / STATE, state)


def find_interrupted(folder: Path, config: dict[str, Any]) -> Interrupted | None:
    """Returns the state of an interrupted run of this configuration; None if there is none.

    :param folder: a run folder, which need not exist.
    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    :raises CannotContinueError: if the state is damaged, or of another version of this package.
    """
    if not is_unfinished(folder, config) or not has_state(folder / STATE):
        return None
    try:
        return _read(folder / STATE)
    except (ValueError, OSError) as error:
        raise CannotContinueError(str(error)) from error


def _read(folder: Path) -> Interrupted:
    state = load_state(folder)
    version = f"{state.get('version')} (schema {state.get('schema_version')})"
    present = f"{__version__} (schema {SCHEMA_VERSION})"
    if version != present:
        raise ValueError(f"its state should be of version {present}, but is of {version}.")
    check_keys(state, {"schema_version", "version", "progress", "strategy"}, str(folder))
    check_keys(state["progress"], {f.name for f in fields(Progressed)}, str(folder))
    return Interrupted(Progressed(**state["progress"]), state["strategy"])


def has_finished_tasks(folder: Path, config: dict[str, Any]) -> bool:
    """Returns whether an interrupted run of this configuration has finished a task.

    :param folder: a run folder, which need not exist.
    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    """
    lines = folder / "metrics.jsonl"
    return (
        is_unfinished(folder, config)
        and lines.is_file()
        and '"event": "task"' in lines.read_text(encoding="utf-8")
    )


def why_unsaved(strategy: Any) -> str | None:
    """Returns why a method's state cannot be saved; None if it can.

    :param strategy: the strategy.
    """
    stateless = plugins_without_state(strategy)
    if stateless:
        return f"{', '.join(stateless)} keeps state that cannot be saved."
    return None


__all__ = ["CannotContinueError", "Interrupted", "Progressed", "find_interrupted", "save_progress"]

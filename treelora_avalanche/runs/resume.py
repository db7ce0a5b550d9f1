"""Where an interrupted run continues: at the last task that it has finished."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from treelora_avalanche._version import __version__
from treelora_avalanche.checkpoint import plugins_without_state, strategy_state
from treelora_avalanche.runs.folder import SCHEMA_VERSION, STATE, is_unfinished
from treelora_avalanche.state import check_keys, has_state, load_state, save_state


@dataclass(frozen=True)
class Progressed:
    """What a run knows after a task, beside its strategy."""

    stages: int
    """ Stages done: tasks, but for methods that train on all at once. """
    train_seconds: float
    eval_seconds: float
    peak_bytes: int
    trees: list[Any]
    """ TreeLoRA's tree after each task; empty for others. """
    lines: dict[str, int]
    """ Length of each growing file. """


@dataclass(frozen=True)
class Interrupted:
    """Where a run stopped."""

    progress: Progressed
    strategy: dict[str, Any]
    """ For :func:`~treelora_avalanche.checkpoint.load_strategy_state`. """


def save_progress(folder: Path, strategy: Any, progress: Progressed) -> None:
    """Write where the run continues if it is interrupted from now on.

    :param folder: the run folder.
    :param strategy: the strategy, after the evaluation of a task.
    :param progress: everything else.
    """
    state = {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "progress": asdict(progress),
        "strategy": strategy_state(strategy),
    }
    save_state(folder / STATE, state)


def find_interrupted(folder: Path, config: dict[str, Any]) -> Interrupted | None:
    """Where a run of this configuration was interrupted in this folder; None if there is none.

    :param folder: a run folder, which need not exist.
    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    :raises ValueError: if its state is damaged, or of another version of this package.
    """
    if not is_unfinished(folder, config) or not has_state(folder / STATE):
        return None
    state = load_state(folder / STATE)
    version = f"{state.get('version')} (schema {state.get('schema_version')})"
    if version != f"{__version__} (schema {SCHEMA_VERSION})":
        raise ValueError(f"its state is of version {version} of treelora-avalanche")
    check_keys(state, {"schema_version", "version", "progress", "strategy"}, f"{folder / STATE}")
    check_keys(state["progress"], {f.name for f in fields(Progressed)}, f"{folder / STATE}")
    progress = Progressed(**state["progress"])
    return Interrupted(progress, state["strategy"])


class CannotContinueError(ValueError):
    """An interrupted run whose state does not fit."""


def has_finished_tasks(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a run of this configuration has finished a task here before it was interrupted."""
    lines = folder / "metrics.jsonl"
    return (
        is_unfinished(folder, config)
        and lines.is_file()
        and '"event": "task"' in lines.read_text(encoding="utf-8")
    )


def why_unsaved(strategy: Any) -> str | None:
    """Why a method's state cannot be saved; None if it can."""
    stateless = plugins_without_state(strategy)
    if stateless:
        return f"{', '.join(stateless)} keeps state that cannot be saved"
    return None


__all__ = ["CannotContinueError", "Interrupted", "Progressed", "find_interrupted", "save_progress"]

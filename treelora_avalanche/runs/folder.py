"""Files of a run folder: written atomically, and never over the files of another program."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from treelora_avalanche._version import __version__
from treelora_avalanche.runs.distributed import is_first

SCHEMA_VERSION = 3
STATE = "state"
MODEL = "model"
APPENDED = (
    "metrics.jsonl",
    "generated.jsonl",
    "tree.txt",
    "training_results.csv",
    "eval_results.csv",
)
"""Text files that grow line by line."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces a file if no error is raised.

    :param path: the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically.

    :param path: the file.
    :param text: its new content.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """Replaces numbers that JSON does not have (NaN: not evaluated) by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value


def to_json(value: Any, indent: int | None = 2) -> str:
    """Returns strict JSON, with null for NaN and infinities.

    >>> to_json({"accuracy": [0.5, math.nan]}, indent=None)
    '{"accuracy": [0.5, null]}'

    :param value: the value.
    :param indent: spaces of indentation; None for a single line.
    """
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def write_results(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Writes ``results.json``, which marks a run as finished.

    :param folder: the run folder.
    :param results: its content.
    :return: the content as read back from JSON, with None for NaN.
    """
    text = to_json(results)
    write_text(folder / "results.json", text)
    content: dict[str, Any] = json.loads(text)
    return content


def run_name(config: dict[str, Any]) -> str:
    """Returns a folder name unique to a configuration and a version of the package.

    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    """
    text = json.dumps([__version__, SCHEMA_VERSION, config], sort_keys=True)
    return (
        f"{config['method']}-seed{config['seed']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def finished_results(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the results in a run folder; None unless of this configuration and version.

    :param folder: a run folder, which need not exist.
    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    """
    results = read_results(folder / "results.json")
    return results if results is not None and results["config"] == config else None


def read_results(file: Path) -> dict[str, Any] | None:
    """Returns the content of a ``results.json``; None unless whole and of this version.

    :param file: the file, which need not exist.
    """
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        whole = (
            results["schema_version"] == SCHEMA_VERSION
            and results["versions"]["treelora-avalanche"] == __version__
            and isinstance(results["config"], dict)
        )
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError, TypeError):
        return None
    return results if whole else None


def changed_inputs(results: dict[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """Returns the inputs that have changed since a run: data, checkpoint, model or code.

    :param results: content of a ``results.json``.
    :param inputs: from :func:`~treelora_avalanche.runs.fingerprints.fingerprints`; an input that is
        missing on one side, as on a machine without the data, counts as unchanged.
    """
    before = results.get("fingerprints", {})
    return [name for name, value in inputs.items() if before.get(name, value) != value]


def set_aside(folder: Path) -> Path:
    """Renames a run folder to the first free name ``FOLDER.old1``, ``FOLDER.old2``, ...

    :param folder: a finished run.
    :return: where it is now.
    """
    taken = (folder.with_name(f"{folder.name}.old{n}") for n in itertools.count(1))
    aside = next(path for path in taken if not path.exists())
    return folder.rename(aside)


def is_unfinished(folder: Path, config: dict[str, Any]) -> bool:
    """Returns whether the folder holds an interrupted run of this configuration.

    :param folder: a run folder, which need not exist.
    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    """
    try:
        written = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, yaml.YAMLError):
        return False
    return bool(written == config) and not (folder / "results.json").exists()


def check_folder(folder: Path, config: dict[str, Any]) -> None:
    """Raises an error for a folder that a run may not write to.

    :param folder: the run folder, which need not exist.
    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    :raises ValueError: if the folder holds anything but an unfinished run, or the same one.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"`--output` should be a folder, but {folder} is a file. Choose another path."
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.yaml").is_file():
        raise ValueError(
            f"`--output` should be empty or a run folder, but {folder} is not empty and holds no "
            "run. Choose another folder."
        )
    if (folder / "results.json").is_file() and finished_results(folder, config) is None:
        raise ValueError(
            f"`--output` should not hold results, but {folder} holds another finished run. Choose "
            "another folder."
        )


def prepare_folder(folder: Path, config: dict[str, Any], *, keep: bool = False) -> None:
    """Deletes the files of an earlier run, and of nothing else; then writes ``config.yaml``.

    :param folder: the run folder.
    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    :param keep: whether to keep the files, since their run is resumed.
    :raises ValueError: see :func:`check_folder`.
    """
    check_folder(folder, config)
    if (folder / "results.json").is_file() and not keep and is_first():
        set_aside(folder)  # it is run again, since its inputs have changed or by `--force`
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").unlink(missing_ok=True)
    if keep:
        return
    # results.json first: a half-deleted folder must not look finished.
    for name in ("results.json", "harness.json", "tree.json", "tree.safetensors", *APPENDED):
        (folder / name).unlink(missing_ok=True)
    for name in ("adapters", "tensorboard", MODEL):
        shutil.rmtree(folder / name, ignore_errors=True)
    remove_state(folder)
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def remove_state(folder: Path) -> None:
    """Deletes the state that a run resumes from, partly written ones included.

    :param folder: the run folder.
    """
    for path in folder.glob(f"{STATE}*"):
        shutil.rmtree(path, ignore_errors=True)


def count_lines(folder: Path) -> dict[str, int]:
    """Returns the number of lines of each growing file.

    :param folder: the run folder.
    """
    return {
        name: len((folder / name).read_text(encoding="utf-8").splitlines())
        for name in APPENDED
        if (folder / name).is_file()
    }


def first_lines(folder: Path, counts: dict[str, int]) -> dict[str, str]:
    """Returns the growing files, truncated to the given numbers of lines.

    :param folder: the run folder.
    :param counts: from :func:`count_lines`.
    """
    return {
        name: "".join((folder / name).read_text(encoding="utf-8").splitlines(keepends=True)[:count])
        for name, count in counts.items()
        if (folder / name).is_file()
    }


__all__ = [
    "APPENDED",
    "MODEL",
    "SCHEMA_VERSION",
    "STATE",
    "changed_inputs",
    "check_folder",
    "count_lines",
    "finished_results",
    "first_lines",
    "is_unfinished",
    "prepare_folder",
    "read_results",
    "remove_state",
    "run_name",
    "set_aside",
    "to_json",
    "write_results",
    "write_text",
]

"""The classes of each task, as users list them: in Python, or in a YAML or JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TaskClasses = Mapping[str, Sequence[str | int]] | Sequence[Sequence[str | int]] | str | Path
"""Names of classes by task, a list of such lists, or a file of either."""


def read_task_classes(task_classes: TaskClasses) -> dict[str, list[str | int]]:
    """Returns the classes of each task by the name of the task, in order of arrival.

    Names in files stay as written: ``001`` is the class "001".

    >>> read_task_classes([["ant", "bee"], ["cat"]])
    {'0': ['ant', 'bee'], '1': ['cat']}

    :param task_classes: names of classes by task, a list of such lists, or a file of either.
    :raises FileNotFoundError: if the file is missing.
    :raises ValueError: if the file cannot be read, or a task is no list of names.
    """
    source = "`task_classes`"
    content: Any = task_classes
    if isinstance(task_classes, str | Path):
        path = Path(task_classes).expanduser()
        source, content = f"`task_classes`, {str(path)!r},", _read(path)
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = {str(number): classes for number, classes in enumerate(content)}
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"{source} should list the classes of each task, but is {content!r}. Write "
            "{first: [ant, bee], second: [cat]}."
        )
    for task, classes in content.items():
        if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
            raise ValueError(
                f"{source} should list class names, but task {task!r} is {classes!r}. Write "
                f"{task}: [ant, bee]."
            )
        for name in classes:
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise ValueError(
                    f"{source} should list class names, but task {task!r} holds {name!r}. Put "
                    "names in quotes."
                )
    return {str(task): list(classes) for task, classes in content.items()}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"`task_classes` should be a YAML or JSON file, but {str(path)!r} is not a file. "
            "Correct the path."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
        return yaml.load(text, yaml.BaseLoader)  # a SafeLoader would read 001 as 1
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`task_classes` should be a YAML or JSON file in UTF-8, but {str(path)!r} cannot be "
            f"read ({reason}). Correct the file."
        ) from error

"""Prompts and answers in JSON and JSONL files, with errors that name the file and the record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".json", ".jsonl")


class TextRecord(NamedTuple):
    """One sample as text.

    >>> TextRecord("2 + 2 =", " 4").answer
    ' 4'

    :param prompt: the text that is given.
    :param answer: the text to generate.
    """

    prompt: str
    answer: str


class Records(NamedTuple):
    """The records of one file.

    >>> Records(Path("sums.json"), [TextRecord("1 + 1 =", " 2")]).first(0).records
    []

    :param file: the file, named by errors and log messages.
    :param records: its records.
    """

    file: Path
    records: list[TextRecord]

    def first(self, limit: int | None) -> Records:
        """Returns the first records.

        :param limit: their number; None for all.
        """
        return Records(self.file, self.records[:limit])


def read_json(file: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON file (a list of objects) or a JSONL file (one per line).

    :param file: the file.
    :raises FileNotFoundError: if it is missing.
    :raises ValueError: if it is not JSON, or holds anything but records.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; put the task's file there, or leave it out.")
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid {file.suffix[1:].upper()} ({error}).") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{file} should hold a list of records, but holds none.")
    for number, record in enumerate(found):
        if not isinstance(record, dict):
            raise ValueError(
                f"record {number} of {file} should be an object such as {{'prompt': ..., "
                f"'answer': ...}}, but is a {type(record).__name__}."
            )
    return found


def text_of(record: Mapping[str, Any], key: str, file: Path, number: int) -> str:
    """Returns one text of a record.

    :param record: the record.
    :param key: the key of the text.
    :param file: the file of the record, for errors.
    :param number: its position in the file, from 0.
    :raises ValueError: if there is no such text, or it is empty.
    """
    if key not in record:
        known = ", ".join(map(repr, record)) or "nothing"
        raise ValueError(f"record {number} of {file} lacks {key!r}; it has {known}.")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(
            f"{key!r} of record {number} of {file} should be a text, but is a "
            f"{type(text).__name__}."
        )
    if not text.strip():
        raise ValueError(
            f"{key!r} of record {number} of {file} is empty, so that there is nothing to learn; "
            "complete the record or remove it."
        )
    return text


def read_records(file: Path) -> Records:
    """Returns the records of a file of ``{"prompt": ..., "answer": ...}``.

    :param file: a JSON or JSONL file.
    :raises FileNotFoundError: if it is missing.
    :raises ValueError: if it does not hold such records; the error names file and record.
    """
    return Records(
        file,
        [
            TextRecord(text_of(r, "prompt", file, n), text_of(r, "answer", file, n))
            for n, r in enumerate(read_json(file))
        ],
    )

"""Prompts and answers as they lie on disk: JSON and JSONL, with errors that name the record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".json", ".jsonl")


class TextRecord(NamedTuple):
    """One sample as text."""

    prompt: str
    answer: str


class Records(NamedTuple):
    """The records of one file."""

    file: Path
    records: list[TextRecord]

    def first(self, limit: int | None) -> Records:
        """The first of them.

        :param limit: how many; None for all.
        """
        return Records(self.file, self.records[:limit])


def read_json(file: Path) -> list[dict[str, Any]]:
    """The records of a JSON file (a list of objects) or a JSONL file (one object per line).

    :param file: the file.
    :raises FileNotFoundError: if there is none.
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
        raise ValueError(f"{file} should hold a list of records, and holds none.")
    for number, record in enumerate(found):
        if not isinstance(record, dict):
            raise ValueError(
                f"record {number} of {file} is a {type(record).__name__}; it should be an object "
                "such as {'prompt': ..., 'answer': ...}."
            )
    return found


def text_of(record: Mapping[str, Any], key: str, file: Path, number: int) -> str:
    """One text of a record.

    :param record: the record.
    :param key: the text's name.
    :param file: where it is from.
    :param number: its place there, from 0.
    :raises ValueError: if there is none, or it is empty.
    """
    if key not in record:
        known = ", ".join(map(repr, record)) or "nothing"
        raise ValueError(f"record {number} of {file} lacks {key!r}; it has {known}.")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(
            f"{key!r} of record {number} of {file} is a {type(text).__name__}; make it a text."
        )
    if not text.strip():
        raise ValueError(
            f"{key!r} of record {number} of {file} is empty, so that there is nothing to learn; "
            "complete the record or take it out."
        )
    return text


def read_records(file: Path) -> Records:
    """The records of a file of ``{"prompt": ..., "answer": ...}``.

    :param file: a JSON or JSONL file.
    :raises FileNotFoundError: if there is none.
    :raises ValueError: if it does not hold such records; file and record are named.
    """
    return Records(
        file,
        [
            TextRecord(text_of(r, "prompt", file, n), text_of(r, "answer", file, n))
            for n, r in enumerate(read_json(file))
        ],
    )

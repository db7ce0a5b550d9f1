"""Prompts and answers in JSON and JSONL files, with errors that name the file and the record."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".json", ".jsonl")
KEYS: tuple[tuple[str, ...], ...] = (
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text", "label"),
    ("messages",),
)
"""Keys of the prompt and the answer; the first are taken if a record also has others."""


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
    text = read_utf8(file)
    found = _json_lines(file, text) if file.suffix == ".jsonl" else _json(file, text)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{file} should hold a list of records, but holds none.")
    for number, record in enumerate(found):
        if not isinstance(record, dict):
            raise ValueError(
                f"record {number} of {file} should be an object such as {{'prompt': ..., "
                f"'answer': ...}}, but is a {type(record).__name__}."
            )
    return found


def read_utf8(file: Path) -> str:
    """Returns the text of a UTF-8 file, with or without a byte-order mark.

    :param file: the file.
    :raises ValueError: if it has another encoding; the error names the file and the position.
    """
    content = file.read_bytes()
    n_mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[n_mark:].decode("utf-8")
        # UTF-16 of plain letters is valid UTF-8 with zeros, which no text file holds.
        position = content.find(b"\0")
    except UnicodeDecodeError as error:
        position = n_mark + error.start
    if position >= 0:
        line = content.count(b"\n", 0, position) + 1
        raise ValueError(
            f"{file} should be encoded in UTF-8, but byte {position} (0x{content[position]:02x}, "
            f"in line {line}) is not. Save the file as UTF-8."
        )
    return text


def _json(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = (
            " If it holds one record per line, name it .jsonl." if error.msg == "Extra data" else ""
        )
        raise ValueError(f"{file} is not valid JSON ({error}).{lines}") from error


def _json_lines(file: Path, text: str) -> list[Any]:
    """Returns the value of each line; only a line feed ends one, as strings may hold U+2028."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip(" \t\r"):
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file} is not valid JSONL (line {number}, column {error.colno}: {error.msg})."
            ) from error
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
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key!r} of record {number} of {file} should be a text, but holds half of a character "
            "(a lone surrogate, such as \\ud83d). Complete or remove it."
        ) from error
    return text


def read_records(file: Path) -> Records:
    """Returns the records of a file of ``{"prompt": ..., "answer": ...}``, or of other usual keys.

    The others are ``prompt`` and ``completion``; ``instruction``, ``input`` and ``output``, where
    an ``input`` follows the instruction on a new line; ``text`` and ``label``, where a label may be
    an integer; and ``messages``, of a user and the assistant, where the text of a system comes
    first, with an empty line after it.

    :param file: a JSON or JSONL file.
    :raises FileNotFoundError: if it is missing.
    :raises ValueError: if it does not hold such records; the error names file and record.
    """
    return Records(file, [_as_record(r, file, n) for n, r in enumerate(read_json(file))])


def _as_record(record: Mapping[str, Any], file: Path, number: int) -> TextRecord:
    """Returns the prompt and the answer of a record, by whichever keys it has."""
    found = [keys for keys in KEYS if all(key in record for key in keys)]
    if not found:
        lacking = "answer" if "prompt" in record else "prompt"
        raise ValueError(
            f"record {number} of {file} lacks {lacking!r}; it has "
            f"{', '.join(map(repr, record)) or 'nothing'}. Accepted are the keys "
            f"{'; '.join(' and '.join(keys) for keys in KEYS)}."
        )
    if len(found) > 1 and found[0] != KEYS[0]:
        raise ValueError(
            f"record {number} of {file} has {' as well as '.join(map(' and '.join, found))}, of "
            "which only one can be learned. Remove the others, or name them 'prompt' and 'answer'."
        )
    if found[0] == ("messages",):
        return _of_messages(record["messages"], file, number)
    prompt_key, answer_key = found[0][0], found[0][1]
    prompt = text_of(record, prompt_key, file, number)
    if prompt_key == "instruction" and record.get("input"):
        prompt = f"{prompt}\n{text_of(record, 'input', file, number)}"
    if answer_key == "label" and type(record["label"]) is int:
        return TextRecord(prompt, str(record["label"]))
    return TextRecord(prompt, text_of(record, answer_key, file, number))


def _of_messages(messages: Any, file: Path, number: int) -> TextRecord:
    """Returns the record of a conversation of one turn."""
    listed = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    roles = [message.get("role") for message in messages] if listed else messages
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f"'messages' of record {number} of {file} should be of a user and the assistant, or of "
            f"system, user and assistant, but the roles are {roles!r}. Make one record of each "
            "answer, with what precedes it as the 'prompt'."
        )
    *before, answer = (text_of(message, "content", file, number) for message in messages)
    return TextRecord("\n\n".join(before), answer)

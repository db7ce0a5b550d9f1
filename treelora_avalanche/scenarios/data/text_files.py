"""Records in JSON, JSONL, CSV and Parquet files, as written, with their places for errors."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

_LONGEST_CELL = 2**31 - 1  # what a C long holds on every system


class RawRecord(NamedTuple):
    """A record as written.

    >>> RawRecord({"prompt": "2 + 2 =", "answer": " 4"}, "record 0 of sums.json").values["answer"]
    ' 4'

    :param values: its values by key, or by column.
    :param place: its position and file, for errors.
    """

    values: Mapping[str, Any]
    place: str


def read_file(file: Path) -> list[RawRecord]:
    """Returns the records of a file, read by its suffix, one of :data:`SUFFIXES`.

    The cells of a CSV file are texts: ``007`` and ``nan`` stay as written.

    :param file: the file.
    :raises FileNotFoundError: if it is missing.
    :raises ValueError: if it cannot be read, or holds no records.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; put the task's file there, or leave it out.")
    if file.suffix == ".csv":
        found = list(_csv_records(file, read_utf8(file)))
    else:
        read = _read_parquet if file.suffix == ".parquet" else read_json
        found = [RawRecord(r, f"record {n} of {file}") for n, r in enumerate(read(file))]
    if not found:
        raise ValueError(f"{file} should hold a list of records, but holds none.")
    return found


def read_json(file: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON file (a list of objects) or a JSONL file (one per line).

    :param file: the file.
    :raises ValueError: if it is not JSON, or holds anything but records.
    """
    text = read_utf8(file)
    found = _json_lines(file, text) if file.suffix == ".jsonl" else _json(file, text)
    if not isinstance(found, list):
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


def _csv_records(file: Path, text: str) -> Iterator[RawRecord]:
    """Yields the rows below the header, with the lines in which they start; skips empty lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    line, number = 1, 0
    with _cells_of_any_length():
        try:
            for row in reader:
                if columns is None and row:
                    columns = row
                    _check_separator(columns, f"{file} (line {line})")
                    _check_columns(columns, f"{file} (line {line})")
                elif columns is not None and row:
                    place = f"record {number} of {file} (line {line})"
                    if len(row) != len(columns):
                        raise ValueError(
                            f"{place} should have {len(columns)} cells, as the header has, but has "
                            f"{len(row)}. Put quotes around a cell that holds a comma."
                        )
                    yield RawRecord(dict(zip(columns, row, strict=True)), place)
                    number += 1
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{file} is not valid CSV (from line {line}: {error}). A quote within a quoted "
                "cell is written twice."
            ) from error


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Lifts the limit of 131,072 characters, which belongs to the process."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_separator(columns: Sequence[str], place: str) -> None:
    """Raises an error if the header of a CSV file is separated by anything but commas."""
    other = next((mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]), None)
    if other is not None:
        raise ValueError(
            f"{place} should separate its columns by commas, but has the one column "
            f"{columns[0]!r}. Save the file with commas instead of {other!r}."
        )


def _check_columns(columns: Sequence[str], place: str) -> None:
    """Raises an error if columns share a name."""
    twice = [name for k, name in enumerate(columns) if name and name in columns[:k]]
    if twice:
        raise ValueError(
            f"{place} should name its columns differently, but has {twice[0]!r} twice. Rename one."
        )


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(
            f"{file} is a Parquet file, which needs pyarrow. Install it with "
            "`pip install treelora-avalanche[parquet]`."
        ) from error
    try:
        table = ParquetFile(file).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not valid Parquet ({error}).") from error
    _check_columns(table.column_names, str(file))
    records: list[dict[str, Any]] = table.to_pylist()
    return records

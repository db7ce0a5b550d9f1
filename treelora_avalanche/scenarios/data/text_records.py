"""Prompts and answers of records, with errors that name the file and the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from treelora_avalanche.choices import check_known
from treelora_avalanche.scenarios.data.text_files import RawRecord, read_file

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
    """The records of one file, or of one split of a data set.

    >>> Records(Path("sums.json"), [TextRecord("1 + 1 =", " 2")]).first(0).records
    []

    :param file: the file, or the name of the split, for errors and log messages.
    :param records: its records.
    """

    file: Path | str
    records: list[TextRecord]

    def first(self, limit: int | None) -> Records:
        """Returns the first records.

        :param limit: their number; None for all.
        """
        return Records(self.file, self.records[:limit])


def check_limits(limit: int | None, eval_limit: int | str | None) -> tuple[int | None, int | None]:
    """Returns the numbers of records for training and for testing; None for all.

    >>> check_limits(64, None), check_limits(64, 8), check_limits(64, "all")
    ((64, 64), (64, 8), (64, None))

    :param limit: number of records used of each file.
    :param eval_limit: number of records for testing, or ``"all"``; None for ``limit``.
    :raises ValueError: if one is below 1, or another word.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` should be at least 1, but is {limit}. Use None for all records.")
    if eval_limit is None:
        return limit, limit
    if eval_limit == "all":
        return limit, None
    if not isinstance(eval_limit, int) or eval_limit < 1:
        raise ValueError(
            f"`eval_limit` should be at least 1, or 'all', but is {eval_limit!r}. Use None for the "
            "number in `limit`."
        )
    return limit, eval_limit


def text_of(record: Mapping[str, Any], key: str, place: str) -> str:
    """Returns one text of a record.

    :param record: the record.
    :param key: the key of the text.
    :param place: position and file of the record, for errors.
    :raises ValueError: if there is no such text, or it is empty.
    """
    if key not in record:
        raise ValueError(f"{place} lacks {key!r}; it has {_keys_in(record)}.")
    text = record[key]
    if not isinstance(text, str | None):
        raise ValueError(f"{key!r} of {place} should be a text, but is a {type(text).__name__}.")
    if text is None or not text.strip():
        raise ValueError(
            f"{key!r} of {place} is empty, so that there is nothing to learn; complete the record "
            "or remove it."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key!r} of {place} should be a text, but holds half of a character (a lone "
            "surrogate, such as \\ud83d). Complete or remove it."
        ) from error
    return text


def read_records(file: Path, keys: Mapping[str, str] | None = None) -> Records:
    """Returns the records of a file of ``{"prompt": ..., "answer": ...}``, or of other usual keys.

    The others are ``prompt`` and ``completion``; ``instruction``, ``input`` and ``output``, where
    an ``input`` follows the instruction on a new line; ``text`` and ``label``, where a label may be
    an integer; and ``messages``, of a user and the assistant, where the text of a system comes
    first, with an empty line after it. In CSV and Parquet files, the keys are the columns.

    :param file: a JSON, JSONL, CSV or Parquet file.
    :param keys: the file's own names of these keys, such as ``{"prompt": "question"}``.
    :raises FileNotFoundError: if it is missing.
    :raises ValueError: if it does not hold such records; the error names file and record.
    """
    return Records(file, as_records(read_file(file), keys))


def as_records(raw: Iterable[RawRecord], keys: Mapping[str, str] | None = None) -> list[TextRecord]:
    """Returns the prompts and answers of records.

    >>> as_records([RawRecord({"q": "1 + 1 =", "answer": "2"}, "record 0")], {"prompt": "q"})
    [TextRecord(prompt='1 + 1 =', answer='2')]

    :param raw: the records as written.
    :param keys: their own names of the keys in :data:`KEYS` and of ``input``.
    :raises ValueError: if a record lacks them, or ``keys`` fits none of :data:`KEYS`.
    """
    keys = keys or {}
    pairs = _pairs_of(keys)
    return [_as_record(record, place, keys, pairs) for record, place in raw]


def _pairs_of(keys: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Returns those of :data:`KEYS` that can have the mapped keys."""
    known = [*dict.fromkeys(key for pair in KEYS for key in pair), "input"]
    for key in keys:
        check_known("key in `keys`", key, known)
    pairs = [pair for pair in KEYS if set(keys) <= {*pair, *_optional(pair)}]
    if not pairs:
        raise ValueError(
            f"`keys` should name keys of one record, but names {', '.join(keys)}. Choose among "
            f"{_accepted()}."
        )
    return pairs


def _optional(pair: tuple[str, ...]) -> tuple[str, ...]:
    return ("input",) if pair[0] == "instruction" else ()


def _accepted() -> str:
    return "; ".join(" and ".join(pair) for pair in KEYS)


def _keys_in(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "nothing"


def _as_record(
    record: Mapping[str, Any],
    place: str,
    keys: Mapping[str, str],
    pairs: list[tuple[str, ...]],
) -> TextRecord:
    """Returns the prompt and the answer of a record, by whichever keys it has."""
    for key, name in keys.items():
        if name not in record:
            raise ValueError(
                f"{place} lacks {name!r}, its {key!r} in `keys`; it has {_keys_in(record)}."
            )
    found = [pair for pair in pairs if all(keys.get(key, key) in record for key in pair)]
    if not found:
        lacking = "answer" if keys.get("prompt", "prompt") in record else "prompt"
        raise ValueError(
            f"{place} lacks {lacking!r}; it has {_keys_in(record)}. Accepted are the keys "
            f"{_accepted()}; name others in `keys`."
        )
    if len(found) > 1 and found[0] != KEYS[0]:
        raise ValueError(
            f"{place} has {' as well as '.join(map(' and '.join, found))}, of which only one can "
            "be learned. Remove the others, or name them 'prompt' and 'answer'."
        )
    if found[0] == ("messages",):
        return _of_messages(record, keys.get("messages", "messages"), place)
    prompt_key, answer_key = (keys.get(key, key) for key in found[0])
    prompt = text_of(record, prompt_key, place)
    input_key = keys.get("input", "input")
    if found[0][0] == "instruction" and record.get(input_key):
        prompt = f"{prompt}\n{text_of(record, input_key, place)}"
    if found[0][1] == "label" and type(record[answer_key]) is int:
        return TextRecord(prompt, str(record[answer_key]))
    return TextRecord(prompt, text_of(record, answer_key, place))


def _of_messages(record: Mapping[str, Any], key: str, place: str) -> TextRecord:
    """Returns the record of a conversation of one turn."""
    messages = record[key]
    listed = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    roles = [message.get("role") for message in messages] if listed else messages
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f"{key!r} of {place} should be of a user and the assistant, or of system, user and "
            f"assistant, but the roles are {roles!r}. Make one record of each answer, with what "
            "precedes it as the 'prompt'."
        )
    *before, answer = (text_of(message, "content", place) for message in messages)
    return TextRecord("\n\n".join(before), answer)

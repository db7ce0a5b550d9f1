"""Choice of the metric and the length of generated answers from the answers for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from treelora_avalanche.models.tokenization import encode_answer
from treelora_avalanche.scenarios.data.text_records import TextRecord

MAX_LABEL_TOKENS = 50
"""Limit of the tokens of a label, as in O-LoRA's release."""


class Scoring(NamedTuple):
    """How the generated answers of a task are scored.

    >>> Scoring("accuracy", max_new_tokens=4).metric
    'accuracy'

    :param metric: a name in :data:`~treelora_avalanche.choices.TEXT_METRICS`.
    :param max_new_tokens: limit of a generated answer, with its end token.
    """

    metric: str
    max_new_tokens: int


FREE_TEXT = Scoring("rouge_l", 128)
"""For answers that are not labels."""


def choose_scoring(records: Sequence[TextRecord], tokenizer: Any) -> Scoring:
    """Returns exact match (``accuracy``) for labels, and :data:`FREE_TEXT` for other answers.

    Answers are labels if each occurs twice on average, and the longest has at most
    :data:`MAX_LABEL_TOKENS` tokens; generation then stops at the longest and its end token.

    :param records: the records for training.
    :param tokenizer: the model's tokenizer.
    """
    answers = {record.answer for record in records}
    if 2 * len(answers) > len(records):
        return FREE_TEXT
    longest = max(len(encode_answer(tokenizer, answer)) for answer in answers)
    return FREE_TEXT if longest > MAX_LABEL_TOKENS + 1 else Scoring("accuracy", longest)

"""Scores of answers that take no learning: the majority answer and chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from treelora_avalanche.metrics.text_scores import compared_part, mean_score


class ConstantAnswers(NamedTuple):
    """Scores that a trained model should exceed on a task with few distinct answers.

    :param n_answers: number of distinct training answers.
    :param majority_answer: the most frequent training answer; of several, the first.
    :param majority: test score of always giving it, in [0, 1].
    :param chance: 1 / ``n_answers``.
    """

    n_answers: int
    majority_answer: str
    majority: float
    chance: float


def constant_answers(
    metric: str,
    training_answers: Sequence[str],
    answers: Sequence[str],
    sources: Sequence[str] | None = None,
) -> ConstantAnswers | None:
    """Returns the scores of the majority answer and of chance.

    Answers that accuracy cannot tell apart count as one, see
    :func:`~treelora_avalanche.metrics.text_scores.compared_part`.

    >>> constant_answers("accuracy", ["C", "A", "C", "C"], ["C", "B", "C", "A"])
    ConstantAnswers(n_answers=2, majority_answer='C', majority=0.5, chance=0.5)

    :param metric: a name in :data:`~treelora_avalanche.choices.TEXT_METRICS`.
    :param training_answers: reference answers of the training samples.
    :param answers: reference answers of the test samples, at least one.
    :param sources: the text that each test sample simplifies; only SARI needs it.
    :return: the scores; None if there are fewer than two training samples per distinct answer.
    """
    whole = metric != "accuracy"
    kinds = [answer if whole else compared_part(answer) for answer in training_answers]
    counts = Counter(kinds)
    if not counts or 2 * len(counts) > len(kinds):
        return None
    kind = max(counts, key=lambda k: counts[k])
    given = training_answers[kinds.index(kind)]
    majority = mean_score(metric, [given] * len(answers), answers, sources)
    return ConstantAnswers(len(counts), kind, majority, 1 / len(counts))


__all__ = ["ConstantAnswers", "constant_answers"]
